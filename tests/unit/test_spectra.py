"""Power by band and texture inside organs, held to what is known of noise and of Gaussian blur."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from segdiff_dist.spectra import (
    BAND_NAMES,
    BANDS,
    FEWEST_PIXELS_INSIDE,
    band_powers,
    power_ratios,
    sharpness,
    texture_std,
)

RNG = np.random.default_rng(0)


def white(num: int = 24, side: tuple[int, int] = (64, 64), std: float = 30.0, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(128.0, std, (num, *side))


def blurred(images_BHW: Any, sigma: float) -> Any:
    """By a Gaussian of `sigma` pixels, exactly: exp(-2 (pi f sigma)^2) in the spectrum, f in cycles a pixel."""
    fy, fx = np.fft.fftfreq(images_BHW.shape[1])[:, None], np.fft.fftfreq(images_BHW.shape[2])
    gain = np.exp(-2 * (np.pi * sigma) ** 2 * (fy**2 + fx**2))
    return np.fft.ifft2(np.fft.fft2(images_BHW) * gain).real


def ratios(real: Any, generated: Any) -> Any:
    return power_ratios(*band_powers(real, generated))


def expected_of_blur(sigma: float) -> list[float]:
    """The mean of exp(-4 (pi f sigma)^2) over each band's ring of frequencies, in closed form."""
    k, found = 4 * (np.pi * sigma) ** 2, []
    for low, high in BANDS:
        a, b = (0.5 * low) ** 2, (0.5 * high) ** 2
        found.append((np.exp(-k * a) - np.exp(-k * b)) / (k * (b - a)))
    return found


def test_bands_are_named_by_their_share_of_the_nyquist_frequency() -> None:
    assert BAND_NAMES == ("3_12", "12_25", "25_50", "50_75", "75_100")


@pytest.mark.parametrize("side", [(64, 64), (48, 65), (33, 96), (256, 256)])
def test_other_white_noise_has_as_much_power_in_every_band(side: tuple[int, int]) -> None:
    num = 400 if max(side) < 100 else 40  # the coarsest band has few frequencies, each of them noise
    real, generated = white(num, side), white(num, side, seed=1)
    assert ratios(real, generated) == pytest.approx(np.ones(5), abs=0.12)
    # Power is a density: the variance, whatever the size, the window and the band.
    assert np.mean(band_powers(real, generated)[0], axis=0) == pytest.approx(np.full(5, 900.0), rel=0.12)


def test_an_image_is_as_sharp_as_itself() -> None:
    real = white(3)
    assert ratios(real, real.copy()).tolist() == [1.0] * 5
    assert sharpness(ratios(real, real)) == 1.0


@pytest.mark.parametrize("sigma", [0.4, 0.7, 1.0])
@pytest.mark.parametrize("side", [(64, 64), (90, 47)])
def test_blur_of_a_known_width_takes_what_it_must(sigma: float, side: tuple[int, int]) -> None:
    real = white(60, side)
    found = ratios(real, blurred(real, sigma))
    assert found == pytest.approx(np.array(expected_of_blur(sigma)), rel=0.06, abs=0.002)
    assert sharpness(found) < 0.85


def test_brightness_and_scale_of_both_do_not_count() -> None:
    real, generated = white(4), blurred(white(4), 0.8)
    plain = ratios(real, generated)
    assert ratios(0.37 * real + 20, 0.37 * generated + 90) == pytest.approx(plain, rel=1e-9)
    assert ratios(real, 0.5 * real) == pytest.approx(np.full(5, 0.25))


def test_noise_is_seen_as_well_as_blur() -> None:
    smooth = blurred(white(8), 1.0)
    found = ratios(smooth, smooth + white(8, std=5.0, seed=2) - 128)
    assert found[-1] > 2
    assert found[0] == pytest.approx(1.0, abs=0.1)


def test_a_constant_border_does_not_hide_blur() -> None:
    """A bright strip in black padding, as a coronal slice of few rows has it: its edge is in both images."""
    strip = white(30, (26, 64), std=8.0)
    smooth = blurred(strip, 1.0)
    real, generated = np.zeros((2, 30, 64, 64))
    real[:, 19:45], generated[:, 19:45] = strip, smooth
    found = ratios(real, generated)
    assert found == pytest.approx(ratios(strip, smooth), rel=0.1, abs=0.01)
    # The whole images' spectra, without box and window, are all but alike: the edge is most of what they show.
    plain = [np.abs(np.fft.fft2(images)) ** 2 for images in (real, generated)]
    radius = np.hypot(np.fft.fftfreq(64)[:, None], np.fft.fftfreq(64)) / 0.5
    finest = (radius >= 0.75) & (radius < 1)
    assert found[-1] < 0.1 < 0.5 < plain[1][:, finest].sum() / plain[0][:, finest].sum()


def test_what_meets_at_opposite_sides_does_not_hide_blur() -> None:
    """A ramp from side to side, cut by the field of view, is an edge to a spectrum without a window."""
    ramp = np.linspace(0, 200, 64)[:, None] + np.zeros(64)
    noise = white(30, std=6.0) - 128
    found = ratios(ramp + noise, ramp + blurred(noise, 1.0))
    assert found[2:] == pytest.approx(np.array(expected_of_blur(1.0))[2:], rel=0.1, abs=0.01)


def test_what_cannot_be_measured_is_no_number() -> None:
    constant, narrow = np.full((2, 32, 32), 7.0), np.zeros((2, 32, 32))
    narrow[:, 4:14] = RNG.normal(size=(2, 10, 32))
    for images in (constant, narrow):
        assert np.isnan(ratios(images, images)).all()
        assert np.isnan(sharpness(ratios(images, images)))
    small = white(4, (16, 16))
    assert np.isnan(ratios(small, small)).tolist() == [True, False, False, False, False]
    assert sharpness(ratios(small, small)) == 1.0
    with pytest.raises(ValueError, match="generated_BHW"):
        band_powers(white(2), white(3))


def test_images_without_any_detail_have_no_sharpness() -> None:
    real = white(4)
    found = ratios(real, np.full_like(real, 128.0))
    assert found == pytest.approx(np.zeros(5), abs=1e-12)
    assert sharpness(np.zeros(5)) == 0.0


def test_sharpness_of_known_ratios() -> None:
    assert sharpness(np.array([1.0, 0.5, 2.0, np.nan])) == pytest.approx(0.25 ** (1 / 3))
    both = sharpness(np.array([[0.5, 0.5], [4.0, 1.0]]))
    assert both == pytest.approx([0.5, 0.5])


# Texture


def discs(side: int = 48) -> Any:
    """Two labels, a disc of radius 12 and one of radius 3."""
    y, x = np.mgrid[:side, :side]
    labels = np.zeros((side, side), np.uint8)
    labels[np.hypot(y - 18, x - 18) < 12] = 1
    labels[np.hypot(y - 40, x - 40) < 3] = 2
    return labels


def test_texture_of_white_noise_is_known() -> None:
    """Less its binomial mean, white noise keeps 1 - 2 * 1/4 + (3/8)^2 of its variance: 0.8 of its deviation."""
    labels = np.repeat(discs()[None], 60, axis=0)
    noise = RNG.normal(100, 10, labels.shape)
    found = texture_std(labels, noise, 4)
    assert np.nanmean(found[:, 1]) == pytest.approx(10 * np.sqrt(1 - 0.5 + 0.375**2), rel=0.02)
    assert texture_std(labels, 3 * noise + 5, 4)[:, 1] == pytest.approx(3 * found[:, 1])
    # The small disc has fewer pixels inside than a deviation can be taken of, and the last label is nowhere.
    assert np.isnan(found[:, 2:]).all()
    assert FEWEST_PIXELS_INSIDE > 9


def test_texture_sees_nothing_beyond_the_outline() -> None:
    labels = discs()[None]
    inside = RNG.normal(100, 10, labels.shape)
    other = np.where(labels == 1, inside, 255.0)
    assert texture_std(labels, other, 3)[0, 1] == texture_std(labels, inside, 3)[0, 1]
    # Slow changes of brightness are no texture.
    ramp = np.linspace(0, 250, 48)[None, :, None] + np.zeros(labels.shape)
    assert texture_std(labels, ramp, 3)[0, 1] == pytest.approx(0.0, abs=1e-6)


def test_blur_takes_texture() -> None:
    labels = np.repeat(discs()[None], 8, axis=0)
    noise = white(8, (48, 48), std=12.0)
    sharp, soft = texture_std(labels, noise, 2 + 1), texture_std(labels, blurred(noise, 1.0), 3)
    assert (soft[:, 1] < 0.3 * sharp[:, 1]).all()
