"""Learned soups: mixing coefficients by gradient, by CMA-ES or in closed form."""

from __future__ import annotations
