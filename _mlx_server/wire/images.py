"""The images of a body, which stand in its texts as marks."""

from __future__ import annotations

from _mlx_server.inference.images.images import image_mark, is_image
from _mlx_server.inference.protocol import Scan
from _mlx_server.wire.documents import decode_base64, elsewhere, omitted


class Images:
    """Collects the images and the scans of a body: `files` are theirs, by the marks that stand for
    them in the texts. Whether the model can see them is the engine's to find out, and whether they
    are whole."""

    def __init__(self) -> None:
        self.files: dict[str, bytes | Scan] = {}

    def text(self, data: str, path: str) -> str:
        """What stands for an image, whose file is base64, at `path`: a mark, or a note for what is
        no image."""
        try:
            content = decode_base64(data)
        except ValueError:
            content = b""
        if not is_image(content):
            return omitted(path, "image", "it is no PNG, JPEG, GIF or WebP file")
        mark = image_mark(content)
        self.files[mark] = content
        return mark

    def scan(self, content: bytes, note: str) -> str:
        """What stands for a PDF without text: a mark. `note` is for a model that cannot see."""
        mark = image_mark(content + note.encode())
        self.files[mark] = Scan(content, note)
        return mark

    def url_text(self, url: str | None, path: str, *names: str | None) -> str:
        """What stands for an image with this URL, which has the file in it or is not fetched;
        `names` are other ways to refer to it."""
        head, comma, data = (url or "").partition(",")
        if comma and head.startswith("data:") and head.endswith(";base64"):
            return self.text(data, path)
        return elsewhere(path, "image", url, *names)
