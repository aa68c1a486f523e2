"""Computes what transformers makes of the models and the images of tests/vision_models.py.

    pip install torch transformers pillow
    python tests/vision/make_reference.py [KIND ...]

For each kind of model: `KIND.json`, the names and shapes of its weights, and `KIND.npz`, the tokens
of a prompt with two images, the logits of its last positions, and the next 24 tokens, greedily.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from vision_models import (
    CONFIGS,
    FOLDER,
    GEMMA_MARKS,
    PAD,
    PICTURES,
    TEXT,
    make_weights,
    write_files,
)

POSITIONS, STEPS = 24, 24


def reference(kind: str, path: Path) -> None:
    write_files(kind, path)
    config = AutoConfig.from_pretrained(path)
    empty = AutoModelForImageTextToText.from_config(config)
    empty.save_pretrained(path / "saved")
    saved = [load_file(file) for file in sorted((path / "saved").glob("*.safetensors"))]
    shapes = {name: list(value.shape) for part in saved for name, value in part.items()}
    (FOLDER / f"{kind}.json").write_text(json.dumps(shapes))
    save_file(make_weights(shapes), path / "model.safetensors", {"format": "pt"})
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(path)
    if config.vision_config.model_type == "pixtral":
        # What PixtralProcessor does, which needs torchvision
        side = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
        patch = {"height": side, "width": side}
        seen = processor(images=PICTURES, patch_size=patch, return_tensors="pt")
        sizes = [(int(height) // side, int(width) // side) for height, width in seen["image_sizes"]]
        counts = [rows * columns for rows, columns in sizes]
        lines = [["[IMG]" * columns] * rows for rows, columns in sizes]
        shown = ["[IMG_BREAK]".join(line) + "[IMG_END]" for line in lines]
    elif "gemma" in config.model_type:
        seen = processor(images=PICTURES, return_tensors="pt")
        counts = seen.pop("num_soft_tokens_per_image", torch.tensor([64, 64])).tolist()
        seen.pop("num_crops", None)
        around = "\n\n" if config.model_type == "gemma3" else ""
        start, end, part = GEMMA_MARKS
        shown = [f"{around}{start}{part * count}{end}{around}" for count in counts]
    else:
        seen = processor(images=PICTURES, return_tensors="pt")
        counts = [int(grid.prod()) // 4 for grid in seen["image_grid_thw"]]
        shown = [
            "<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>" for count in counts
        ]
    content = "\n".join([*shown, TEXT])
    text = f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    prompt, answer = tokens[0].tolist(), []
    if config.model_type == "gemma4":  # what its text model gets
        prompt = [config.text_config.pad_token_id if one == PAD else one for one in prompt]
    with torch.no_grad():
        for _ in range(STEPS):
            if config.model_type == "gemma3":
                seen["token_type_ids"] = (tokens == PAD).int()
            elif config.vision_config.model_type != "pixtral":
                seen["mm_token_type_ids"] = (tokens == PAD).int()
            logits = model(tokens, **seen).logits[0]
            if not answer:
                kept = logits[-POSITIONS:].numpy()
            answer.append(int(logits[-1].argmax()))
            tokens = torch.cat([tokens, torch.tensor([[answer[-1]]])], 1)
    spread = float(kept.max() - kept.min())
    print(kind, len(prompt), "tokens, images of", counts, "logits over", spread, answer)
    np.savez_compressed(FOLDER / f"{kind}.npz", prompt=prompt, logits=kept, answer=answer)


for name in sys.argv[1:] or CONFIGS:
    with tempfile.TemporaryDirectory() as folder:
        reference(name, Path(folder))
