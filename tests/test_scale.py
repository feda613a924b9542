"""How large a model's window is on another slide, and what is said of its scale."""

import re
from pathlib import Path

import numpy as np
import pytest

from brstnet.evaluation.slides.scale import Geometry, ModelInput, geometry
from brstnet.evaluation.slides.slide import Slide


def slide(um_per_px: float | None) -> Slide:
    def read(left: int, top: int, width: int, height: int) -> np.ndarray:
        raise AssertionError

    size = (4000, 3000)
    return Slide(
        path=Path("a.svs"), full_px=size, um_per_px=um_per_px, size_px=size, zoom=1.0, read=read
    )


def model(*training_um: float) -> ModelInput:
    return ModelInput(
        window_px=224, input_px=224, target=None, lightness=True, training_um=training_um
    )


def cut(
    slide_um: float | None, training_um: tuple[float, ...], um: float | None = None
) -> Geometry:
    return geometry(slide(slide_um), model(*training_um), 200.0, um)


def test_a_window_spans_the_microns_that_it_was_trained_on() -> None:
    shape = cut(0.25, (0.68, 0.69, 0.685))
    assert shape.window_px == pytest.approx(224 * 0.685 / 0.25)
    assert shape.scale == pytest.approx(0.685 / 0.25)
    assert shape.pitch_px == 800
    assert shape.warnings == ()


def test_training_slides_of_unlike_scales_are_told() -> None:
    shape = cut(0.5, (0.5, 0.51, 0.6))
    assert shape.window_px == pytest.approx(224 * 0.51 / 0.5)
    (note,) = shape.warnings
    assert note.startswith("the model's training slides have 0.500 to 0.600 um a pixel; their med")
    assert "0.510, was taken" in note
    assert not cut(0.5, (0.5, 0.514)).warnings


@pytest.mark.parametrize(
    ("slide_um", "training_um", "um", "note"),
    [
        (0.5, (0.5,), 0.52, r"the file says 0\.5000 um a pixel; --mpp 0\.52 was taken instead"),
        (0.5, (), None, r"its window of 224 px was taken in this slide's pixels"),
        (None, (), None, r"are unknown \(--mpp\): the pitch is one window"),
        (1.0, (0.5,), None, r"are 2\.00 times as large as .* lack detail that the model knows"),
    ],
)
def test_what_is_not_as_it_should_be_is_told(
    slide_um: float | None, training_um: tuple[float, ...], um: float | None, note: str
) -> None:
    assert any(re.search(note, w) for w in cut(slide_um, training_um, um).warnings)


def test_an_unknown_scale_is_refused_where_the_models_is_known() -> None:
    with pytest.raises(ValueError, match=r"a\.svs: does not say its microns .* at 0\.500: give"):
        cut(None, (0.5,))
    assert cut(None, (0.5,), 0.25).scale == 2
