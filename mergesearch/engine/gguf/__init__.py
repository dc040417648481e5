"""Candidates as GGUF files: written, quantised and answered by llama.cpp."""
