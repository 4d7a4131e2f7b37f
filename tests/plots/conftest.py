"""What the tests of figures share: the texts that a figure draws, and whether they cover each other."""

import itertools

import pytest
from matplotlib.text import Text


@pytest.fixture
def drawn(monkeypatch):
    """Return the texts that a figure draws, after checking that they lie in it and apart from each other."""

    def draw(figure) -> list[str]:
        seen, plain_draw = [], Text.draw
        with monkeypatch.context() as patch:
            patch.setattr(Text, "draw", lambda self, *rest: seen.append(self) or plain_draw(self, *rest))
            figure.canvas.draw()
        texts = list({id(text): text for text in seen if text.get_visible() and text.get_text()}.values())
        boxes = [Text.get_window_extent(text).padded(-1) for text in texts]  # neighbours may touch
        for text, box in zip(texts, boxes, strict=True):
            assert figure.bbox.contains(*box.min) and figure.bbox.contains(*box.max), f"{text} is cut off"
        for (first, a), (second, b) in itertools.combinations(zip(texts, boxes, strict=True), 2):
            assert not a.overlaps(b), f"{first} covers {second}"
        return [text.get_text() for text in texts]

    return draw
