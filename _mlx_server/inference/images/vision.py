"""What a model that sees has beside mlx-lm's part of it. On the MLX thread."""

from __future__ import annotations

import bisect
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from _mlx_server.inference.catalog.models import LocalModel, load_error, weight_files
from _mlx_server.inference.images.image_layout import (
    Gemma3Layout,
    Gemma4Layout,
    ImageLayout,
    MistralLayout,
    QwenLayout,
    tower_name,
)
from _mlx_server.inference.images.image_masks import both_ways
from _mlx_server.inference.prompt.prompt import ImageRun, Prompt

if TYPE_CHECKING:
    import mlx.core as mx

    from _mlx_server.inference.images.tower_gemma import Gemma3Tower, Gemma4Tower
    from _mlx_server.inference.images.tower_pixtral import PixtralTower
    from _mlx_server.inference.images.tower_qwen import QwenTower

    Tower = Gemma3Tower | Gemma4Tower | PixtralTower | QwenTower


class Vision:
    """A model's tower, and how it reads prompts with images.

    The tower reads an image when a chunk of the prompt begins within it, one image a chunk, and its
    output is dropped behind the image's last token: what was read once is in the KV state. `runs`
    counts the images that it has read. Raises ModelLoadError."""

    def __init__(self, local: LocalModel, model: Any, layout: ImageLayout):
        from mlx.utils import tree_flatten

        from _mlx_server.inference.images.mrope import Positions

        self._model, self._layout, self.runs = model, layout, 0
        self._body = model.language_model.model
        self.positions = Positions()
        self._rope: Any = None  # where images take other positions than text
        try:
            self._tower = _load_tower(local, layout)
            if isinstance(layout, QwenLayout):
                self._install(local.config)
        except Exception as error:
            raise load_error(local, f"the vision tower of model '{local.name}'", error) from error
        weights: Any = tree_flatten(self._tower.parameters())
        self.size = sum(array.nbytes for _, array in weights)

    def _install(self, config: dict[str, Any]) -> None:
        from _mlx_server.inference.images.mrope import install

        text = config["text_config"]
        scaling = text.get("rope_parameters") or text.get("rope_scaling") or {}
        self._sections = scaling.get("mrope_section") or [24, 20, 20]
        deep = len(config["vision_config"].get("deepstack_visual_indexes") or [])
        self._rope = install(self._body.layers, deep, self.positions)

    def reserve(self, prompt: Prompt) -> int:
        """Bytes that the tower takes while it reads the largest image of a prompt."""
        counts = [run.picture.count for run in prompt.images]
        return max(counts, default=0) * self._layout.merge**2 * self._tower.patch_nbytes

    def reach(self, prompt: Prompt, start: int, end: int) -> int:
        """How far a prompt can be read from `start` on: `end` at most or, if that is within an
        image that is read as a whole, the image's end. Runs the tower on the image that stands at
        `start`, if it has not read it for this prompt."""
        import mlx.core as mx

        for run in _within(prompt, start, end):
            picture = run.picture
            if picture.features is None and run.start > start:
                return run.start
            if picture.features is None:
                picture.features = self._tower(picture.load())
                picture.pixels = None
                mx.eval(picture.features)
                self.runs += 1
            if self._layout.both_ways != "none":
                end = max(end, run.end)
        return end

    def read(self, prompt: Prompt, start: int, end: int, cache: list[Any]) -> Any:
        """Reads tokens of a prompt, as far as `reach` says; returns the logits, (1, tokens,
        vocabulary)."""
        import mlx.core as mx

        runs = _within(prompt, start, end)
        tokens = mx.array(self.plain(prompt.tokens[start:end]))[None]
        if not runs:
            with self.positions.during(self.shift(prompt, start)):
                return self._model(tokens, cache=cache)
        embeddings = self._body.embed_tokens(tokens)
        deep = [mx.zeros_like(embeddings) for _ in runs[0].picture.features[1]]
        for run in runs:
            begin, stop = max(run.start, start), min(run.end, end)
            part = slice(run.first + begin - run.start, run.first + stop - run.start)
            features, added = run.picture.features
            embeddings[0, begin - start : stop - start] = features[part]
            for layer, more in zip(deep, added, strict=True):
                layer[0, begin - start : stop - start] = more[part]
        rotation = None if self._rope is None else self._rotation(prompt, start, end)
        with self.positions.during(0, rotation, deep), self._attention(runs, start, cache):
            logits = self._model(tokens, cache=cache, input_embeddings=embeddings)
        for run in runs:
            later = (one for one in prompt.images if one.end > end and one.picture is run.picture)
            if next(later, None) is None:
                run.picture.features = None
        return logits

    def _attention(
        self, runs: list[ImageRun], start: int, cache: list[Any]
    ) -> AbstractContextManager[None]:
        """Sets how the images of a chunk that begins at `start` attend to themselves."""
        if self._layout.both_ways == "none":
            return nullcontext()
        images = [(max(run.start - start, 0), run.end - start) for run in runs]
        return both_ways(cache, images, sliding=self._layout.both_ways == "sliding")

    def plain(self, tokens: list[int]) -> list[int]:
        """Tokens that the model knows: in images the one that stands for any part of any image."""
        return [token if token >= 0 else self._layout.token for token in tokens]

    def shift(self, prompt: Prompt, at: int) -> int:
        """What is added to the index of a token, which is in no image, to get its position."""
        if self._rope is None:
            return 0
        return sum(_gained(run) for run in prompt.images if run.end <= at)

    def _rotation(self, prompt: Prompt, start: int, end: int) -> Any:
        """Cosines and sines for tokens with images among them."""
        import numpy

        from _mlx_server.inference.images.mrope import rotation

        shift = self.shift(prompt, start)
        places = numpy.tile(numpy.arange(start, end) + shift, (3, 1))
        for run in _within(prompt, start, end):
            begin, stop = max(run.start, start), min(run.end, end)
            parts = numpy.arange(begin, stop) - run.start
            placement = run.picture.placement
            within = places[:, begin - start : stop - start]
            within[:] = run.start + shift
            within[1] += parts // placement.columns
            within[2] += parts % placement.columns
            places[:, stop - start :] += _gained(run)
            shift += _gained(run)
        return rotation(places, self._rope, self._sections)


class ImageRows:
    """Sets the positions of the rows of a decode batch, which are known by their numbers."""

    def __init__(self, vision: Vision):
        self._vision = vision
        self._shifts: dict[int, int] = {}

    def add(
        self, shifts: dict[int, int], tokens: list[list[int]], others: list[int]
    ) -> list[list[int]]:
        """Comes before the first step of new rows, with what is added to the indices of their
        tokens by their numbers, the tokens that they have read, and the other rows that there are;
        returns the tokens as the model knows them."""
        self._shifts = {row: self._shifts[row] for row in others} | shifts
        return [self._vision.plain(row) for row in tokens]

    def during(self, numbers: list[int]) -> AbstractContextManager[None]:
        """Sets the positions for a step of some rows."""
        import mlx.core as mx

        shifts = [self._shifts[number] for number in numbers]
        if not any(shifts):
            return self._vision.positions.during()
        return self._vision.positions.during(shifts[0] if len(shifts) == 1 else mx.array(shifts))


def _within(prompt: Prompt, start: int, end: int) -> list[ImageRun]:
    """The runs of image tokens that lie, in part at least, between two places."""
    runs = prompt.images
    first = bisect.bisect_right(runs, start, key=lambda run: run.end)
    last = bisect.bisect_left(runs, end, key=lambda run: run.start)
    return runs[first:last]


def _gained(run: ImageRun) -> int:
    """How many positions more an image takes than it has tokens, where it takes as many as rows or
    columns; it is a negative number."""
    placement = run.picture.placement
    return max(placement.rows, placement.columns) - (run.end - run.start)


def _make_tower(config: dict[str, Any], layout: ImageLayout) -> Tower:
    from _mlx_server.inference.images.tower_gemma import Gemma3Tower, Gemma4Tower
    from _mlx_server.inference.images.tower_pixtral import PixtralTower
    from _mlx_server.inference.images.tower_qwen import QwenTower

    towers: dict[type[ImageLayout], Any] = {
        Gemma3Layout: Gemma3Tower,
        Gemma4Layout: Gemma4Tower,
        MistralLayout: PixtralTower,
        QwenLayout: QwenTower,
    }
    tower: Tower = towers[type(layout)](config, layout)
    return tower


def _load_tower(local: LocalModel, layout: ImageLayout) -> Tower:
    """The tower with its weights."""
    import mlx.core as mx
    from mlx import nn

    weights: dict[str, mx.array] = {}
    recipes: dict[str, Any] = {}
    recipe = local.config.get("quantization") or {}
    for file in weight_files(local):
        held: Any = mx.load(str(file))
        for name, value in held.items():
            if (inner := tower_name(name)) is not None:
                weights[inner] = value
                layer = inner.rpartition(".")[0]
                recipes[layer] = recipe.get(name.rpartition(".")[0])
    tower = _make_tower(local.config, layout)
    weights = tower.sanitize(weights)

    def quantized(layer: str, _: Any) -> bool | dict[str, Any]:
        return f"{layer}.scales" in weights and (recipes.get(layer) or True)

    if recipe:
        layers: Any = nn
        size, bits, mode = recipe["group_size"], recipe["bits"], recipe.get("mode", "affine")
        layers.quantize(tower, size, bits, mode=mode, class_predicate=quantized)
    tower.load_weights(list(weights.items()))
    mx.eval(tower.parameters())
    return tower
