"""What a model was trained on, and how large that is on another slide: windows, pitch, microns."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from brstnet.config import Prepare
from brstnet.data import stain
from brstnet.evaluation.slides.slide import Slide, plausible
from brstnet.training.checkpoint import Checkpoint

SAME_SCALE = 0.02
"""Share by which the file and --mpp may differ before it is told."""

SAME_TRAINING_SCALE = 0.03
"""Share by which training slides may differ before it is told: her2st's five differ by 0.5 %, and
one slide's is right to 1 % (`brstnet.data.sections.um_per_px`)."""

LACKS_DETAIL = 0.9
"""A slide with fewer pixels than this in one of the model's is told."""


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """What all members were trained on: pixels of the window and of the stored patch, and stain.

    `training_um` are the microns per pixel of their training slides, as far as they are known: a
    slide stands as often as there are members trained on it.
    """

    window_px: int
    input_px: int
    target: stain.StainTarget | None
    lightness: bool
    training_um: tuple[float, ...] = ()

    @property
    def um_per_px(self) -> float | None:
        """Microns that the model takes a pixel for: the median of its training slides'."""
        return float(np.median(self.training_um)) if self.training_um else None


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How a slide is cut, in pixels of its full resolution.

    `scale` are its pixels in one of the model's; `um_per_px` is the slide's, None if nobody knows.
    """

    window_px: float
    pitch_px: float
    scale: float
    um_per_px: float | None
    warnings: tuple[str, ...] = ()


def model_input(members: Sequence[Checkpoint], um_per_px: float | None = None) -> ModelInput:
    """What the members' stores were prepared like; `um_per_px` goes over what they say.

    Raises:
        ValueError: the members were trained on patches of different kinds.
    """
    kinds = [_input_of(member) for member in members]
    for member, kind in zip(members[1:], kinds[1:], strict=True):
        if _comparable(kind) != _comparable(kinds[0]):
            raise ValueError(
                f"{member.path} and {members[0].path} were trained on patches of "
                "different windows, sizes or stains: predict with each of them apart"
            )
    told = tuple(um for kind in kinds for um in kind.training_um)
    return replace(kinds[0], training_um=told if um_per_px is None else (um_per_px,))


def _input_of(member: Checkpoint) -> ModelInput:
    keys = ("window_px", "input_px", "luminosity")  # what is missing has its default
    try:
        store = member.facts["store"]
        prepared = Prepare(**{k: store["prepare"][k] for k in keys if k in store["prepare"]})
        fields = store["stain_target"]
        target = None if fields is None else stain.StainTarget.from_json(fields)
        known = member.facts.get("um_per_px", {})  # older checkpoints do not say it
        found = [plausible(known.get(section)) for section in member.fold.train]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{member.path}: damaged, or made by something else: its store is not described: "
            f"{type(error).__name__} {error}"
        ) from error
    return ModelInput(
        window_px=prepared.window_px,
        input_px=prepared.input_px,
        target=target,
        lightness=prepared.luminosity == "both",
        training_um=tuple(um for um in found if um is not None),
    )


def _comparable(kind: ModelInput) -> tuple[Any, ...]:
    target = None if kind.target is None else json.dumps(kind.target.to_json())
    return (kind.window_px, kind.input_px, target, kind.lightness)


def geometry(slide: Slide, model: ModelInput, pitch_um: float, um_per_px: float | None) -> Geometry:
    """Window and pitch on this slide, so that a model's pixel spans the microns it was trained on.

    Where the model does not say its own microns per pixel, its window is taken in the slide's
    pixels; where the slide's are not known either, the grid's pitch is one window.

    Args:
        slide: at full resolution.
        model: what it was trained on.
        pitch_um: centre to centre of the grid's spots.
        um_per_px: of the slide, over what the file says.

    Raises:
        ValueError: the model's microns per pixel are known, and the slide's are not.
    """
    um, model_um = um_per_px or slide.um_per_px, model.um_per_px
    if model_um is not None and um is None:
        raise ValueError(
            f"{slide.path}: does not say its microns per pixel, and the model was trained at "
            f"{model_um:.3f}: give --mpp, such as 0.5 for a 20x scan, 0.25 for 40x"
        )
    scale = model_um / um if model_um is not None and um is not None else 1.0
    window_px = model.window_px * scale
    return Geometry(
        window_px=window_px,
        pitch_px=window_px if um is None else pitch_um / um,
        scale=scale,
        um_per_px=um,
        warnings=tuple(_scale_warnings(slide, model, um, scale)),
    )


def _scale_warnings(slide: Slide, model: ModelInput, um: float | None, scale: float) -> list[str]:
    notes = []
    if um is not None and slide.um_per_px and abs(um / slide.um_per_px - 1) > SAME_SCALE:
        notes.append(
            f"the file says {slide.um_per_px:.4f} um a pixel; --mpp {um} was taken instead"
        )
    if model.um_per_px is None:
        notes.append(
            "the model does not say the microns per pixel of its training slides (--model_mpp "
            f"would): its window of {model.window_px} px was taken in this slide's pixels"
        )
    elif (high := max(model.training_um)) > (1 + SAME_TRAINING_SCALE) * min(model.training_um):
        notes.append(
            f"the model's training slides have {min(model.training_um):.3f} to {high:.3f} um a "
            f"pixel; their median, {model.um_per_px:.3f}, was taken (--model_mpp takes another)"
        )
    if um is None:
        notes.append("the slide's microns per pixel are unknown (--mpp): the pitch is one window")
    if scale < LACKS_DETAIL:
        notes.append(
            f"the slide's pixels are {1 / scale:.2f} times as large as those the model was trained "
            "on: its patches are enlarged and lack detail that the model knows"
        )
    return notes
