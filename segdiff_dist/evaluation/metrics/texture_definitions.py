"""Definitions of the metrics of texture inside organs and of air, on the real and on the generated images."""

from __future__ import annotations

from segdiff_dist.evaluation.metrics.definition import Definition


def organ_texture() -> dict[str, Definition]:
    """Noise level, autocorrelation and grey values inside organs, on the real and on the generated images."""
    found = {}
    for side, label in (("real", "real"), ("gen", "generated")):
        found[f"noise_std_{side}"] = Definition(
            f"Noise level, {label} (grey values)",
            2,
            "",
            f"Noise inside organs of the mask on the {label} images: the standard deviation of the grey values minus "
            "their 3x3 binomial mean, divided by 0.80, which is what white noise of 1 leaves; only pixels whose eight "
            "neighbours belong to the same organ; mean over organs, then over images.",
        )
        for lag in (1, 2):
            found[f"autocorrelation_{lag}_{side}"] = Definition(
                f"Autocorrelation, {lag} px, {label}",
                3,
                "",
                f"Correlation of grey values {lag} pixel{'s' * (lag > 1)} apart, along rows and columns, inside organs "
                f"of the mask on the {label} images, after the plane fitted to the organ's grey values is subtracted; "
                "only pixels whose eight neighbours belong to the same organ, at least 36; mean over organs, then over "
                "images. White noise has 0. Smooth texture is near 1.",
            )
        found[f"grey_mean_{side}"] = Definition(
            f"Mean grey value, {label}",
            1,
            "",
            f"Mean grey value (0 to 255) inside the organ's mask on the {label} image, averaged over images.",
        )
        found[f"grey_std_{side}"] = Definition(
            f"Grey spread, {label}",
            1,
            "",
            f"Standard deviation of the grey values (0 to 255) inside the organ's mask on the {label} image, averaged "
            "over images.",
        )
    return found


_AIR_TEXT = (
    "Air is background at least 3 pixels from any label of the mask, in images whose mask holds the class body; it "
    "includes the scanner's table."
)
_LATTICE_TEXT = (
    "The pixels are divided by their place in a square of 2x2 pixels; the lattice is the largest less the smallest of "
    "the four means of fine detail (grey values minus their 3x3 binomial mean). A pattern that repeats every two "
    "pixels raises it. Chance raises it a little where there are few pixels: compare it with the real images'."
)


def air() -> dict[str, Definition]:
    """Air around the patient and the lattice of 2x2 pixels, on the real and on the generated images."""
    found = {}
    for side, label in (("real", "real"), ("gen", "generated")):
        better = "lower" if side == "gen" else ""
        texts = {
            "air_mean": ("Air, mean", f"Mean grey value (0 to 255) of air on the {label} image. {_AIR_TEXT}"),
            "air_std": (
                "Air, spread",
                f"Standard deviation of the grey values of air on the {label} image. {_AIR_TEXT}",
            ),
            "air_lattice": (
                "Air, lattice",
                f"Lattice of 2x2 pixels in air on the {label} image. {_LATTICE_TEXT} {_AIR_TEXT}",
            ),
            "patient_lattice": (
                "Patient, lattice",
                f"Lattice of 2x2 pixels inside the patient on the {label} image: of pixels with a label whose eight "
                f"neighbours have labels too. {_LATTICE_TEXT}",
            ),
        }
        for name, (kind, text) in texts.items():
            is_lattice = name.endswith("lattice")
            shown = f"{kind}, {label} (grey values)"
            found[f"{name}_{side}"] = Definition(
                shown, 3 if is_lattice else 2, better if is_lattice else "", f"{text} Mean over images."
            )
    return found
