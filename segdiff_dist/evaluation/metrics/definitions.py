"""The metrics of the report: label, digits, which values are better, and a description. docs/metrics.md has more."""

from __future__ import annotations

from segdiff_dist.evaluation.metrics.definition import Definition
from segdiff_dist.evaluation.metrics.texture_definitions import air, organ_texture
from segdiff_dist.spectra import BAND_NAMES, BANDS, FEWEST_PIXELS_INSIDE

_PAIRS = {
    "mask_real": "mask, pred. real",
    "real_gen": "pred. real, pred. gen.",
    "mask_gen": "mask, pred. gen.",
}


_TEXT_OF_PAIRS = {
    "mask_real": "The reference is the mask, compared with the segmenter's labels on the real image: the best that the "
    "segmenter can do.",
    "real_gen": "The reference is the segmenter's labels on the real image, compared with those on the generated one.",
    "mask_gen": "The reference is the mask, compared with the segmenter's labels on the generated image.",
}


def _organ_means(kind: str, label: str, better: str, text: str, digits: int = 3) -> dict[str, Definition]:
    """One definition a pair of label maps; the first of a pair is the reference."""
    return {
        f"{kind}_{pair}": Definition(f"{label} ({maps})", digits, better, f"{text} {_TEXT_OF_PAIRS[pair]}")
        for pair, maps in _PAIRS.items()
    }


def _false_positives() -> dict[str, Definition]:
    """Two definitions a pair of label maps."""
    return _organ_means(
        "false_positive_rate",
        "False organs",
        "lower",
        "Of the organs absent from the reference, the share that appears in the other label map; mean over images. For "
        "one organ: of the images without it, the share where it appears.",
    ) | _organ_means(
        "false_positive_area_mm2",
        "Area of false organs, mm²",
        "lower",
        "Area of all organs that appear although the reference does not hold them, together; mean over all images. For "
        "one organ: mean over the images without it.",
        digits=1,
    )


def _neighbourhoods(extractor: str, label: str, features: str) -> dict[str, Definition]:
    texts = {
        "precision": f"Share of generated images in the neighbourhood of a real one, on {features}. The neighbourhood "
        "reaches to the 3rd nearest real image (Kynkäänniemi et al. 2019). It measures fidelity.",
        "recall": f"Share of real images in the neighbourhood of a generated one, on {features}. The neighbourhood "
        "reaches to the 3rd nearest generated image. It measures variety.",
        "density": f"Number of real images whose neighbourhood holds a generated image, divided by 5, on {features}; "
        "mean over generated images. The neighbourhood of a real image reaches to the 5th nearest real image (Naeem et "
        "al. 2020). Density measures fidelity, and outliers change it less than precision. It may exceed 1.",
        "coverage": f"Share of real images whose neighbourhood holds a generated one, on {features}. The neighbourhood "
        "of a real image reaches to the 5th nearest real image (Naeem et al. 2020). Coverage measures variety.",
        "patient_precision": f"Precision on {features}. The neighbourhood reaches to the 3rd nearest real image of "
        "another patient. Slices of one patient resemble each other so much that other neighbourhoods contain no other "
        "patient, not even a real one.",
        "patient_recall": f"Recall on {features}, with neighbourhoods that reach to the 3rd nearest generated image of "
        "another patient's mask.",
    }
    return {
        f"{extractor}_{name}": Definition(f"{label} {name.replace('_', ' ')}", 3, "higher", text)
        for name, text in texts.items()
    }


_FEW = "The mark (few): fewer images a side than twice the features, so that the bias may be larger than the distance."


def wavelengths(band: int) -> str:
    """The wavelengths of one of spectra.BANDS, in pixels."""
    low, high = BANDS[band]
    return f"{2 / high:.3g} to {2 / low:.3g}"


def _sharpness() -> dict[str, Definition]:
    band_text = (
        "Power of the generated images divided by that of the real ones at wavelengths of {} pixels ({:.0%} to {:.0%} "
        "of the Nyquist frequency): sums over images of the radially averaged power spectrum (Durall et al. 2020), "
        "with a Hann window, without constant borders. Below 1 detail is missing, above 1 there is too much."
    )
    labels = ("coarsest", "coarse", "middle", "fine", "finest")
    return {
        "sharpness": Definition(
            "Sharpness",
            3,
            "higher",
            "How near the five power ratios of generated to real images are to 1: exp(-mean of |ln ratio|). It is 1 "
            "where the images have the power of the real ones at every wavelength. Blur and noise lower it.",
        ),
        **{
            f"sharpness_{BAND_NAMES[f]}": Definition(
                f"Power ratio, {label}", 3, "one", band_text.format(wavelengths(f), *BANDS[f])
            )
            for f, label in enumerate(labels)
        },
        "texture": Definition(
            "Texture in organs",
            3,
            "one",
            "Fine detail inside organs, generated divided by real: the standard deviation of the grey values minus "
            f"their 3x3 binomial mean, inside an organ's outline where at least {FEWEST_PIXELS_INSIDE} pixels remain; "
            "mean over organs, then over images. Below 1 organs are too smooth, above 1 too grainy.",
        ),
    }


DEFINITIONS = {
    "psnr_db": Definition(
        "PSNR (dB)",
        2,
        "higher",
        "Peak signal-to-noise ratio of the generated against the real image of the same slice, in one window "
        "(grey values 0 to 255) for both; mean over images. Identical images are left out: their PSNR is infinite.",
    ),
    "ssim": Definition(
        "SSIM",
        3,
        "higher",
        "Structural similarity of the generated and the real image: Gaussian window with sigma 1.5, data range 255, "
        "reflected beyond the border (Wang et al. 2004).",
    ),
    "ms_ssim": Definition(
        "MS-SSIM",
        3,
        "higher",
        "Structural similarity of the generated and the real image on five scales, contrast and structure at each, "
        "luminance at the coarsest (Wang et al. 2003); from 176 pixels a side on.",
    ),
    "lpips": Definition(
        "LPIPS",
        3,
        "lower",
        "Distance of the generated and the real image on AlexNet's features, weighted to agree with people (Zhang et "
        "al. 2018, version 0.1), the grey image as three equal channels.",
    ),
    **_sharpness(),
    **organ_texture(),
    **air(),
    "fid": Definition(
        "FID",
        1,
        "lower",
        "Fréchet distance between real and generated images on the features of torch-fidelity's Inception network "
        "(2048 features). It is biased upwards when there are few images: compare at equal numbers only. " + _FEW,
    ),
    "segmenter_frechet": Definition(
        "Segmenter Fréchet",
        3,
        "lower",
        "Fréchet distance of real and generated images on the auxiliary segmenter's pooled encoder features. It is "
        "not FID and has another scale. Compare it only between runs that were evaluated with the same segmenter and "
        "as many images. " + _FEW,
    ),
    "imagenet_lite_frechet": Definition(
        "ImageNet Fréchet",
        3,
        "lower",
        "Fréchet distance of real and generated images on the 1,280 features of efficientnet-lite0, trained on "
        "ImageNet. It is not FID and has another scale. It depends on no segmenter, so it can be compared between runs "
        "and papers of the same real images and as many images. " + _FEW,
    ),
    "network_frechet": Definition(
        "Given network Fréchet",
        3,
        "lower",
        "Fréchet distance of real and generated images on the features of the network that evaluate.feature_network "
        "names; provenance has its SHA-256. It is not FID and has another scale. Compare it only where the network is "
        "the same, for the same real images and as many images. " + _FEW,
    ),
    "frd": Definition(
        "FRD",
        3,
        "lower",
        "Fréchet radiomics distance: logarithm of the squared Fréchet distance of radiomics features, scaled by the "
        "real images' mean and standard deviation (Konz et al. 2026, version 1 of frd-score). " + _FEW,
    ),
    "kid": Definition(
        "KID",
        4,
        "lower",
        "Squared maximum mean discrepancy with a cubic kernel on Inception's features, unbiased, so comparable "
        "between numbers of images (Binkowski et al. 2018); over all pairs rather than random subsets.",
    ),
    "imagenet_lite_kernel_distance": Definition(
        "ImageNet kernel distance",
        4,
        "lower",
        "Squared maximum mean discrepancy with KID's cubic kernel on efficientnet-lite0's features, unbiased, so "
        "comparable between numbers of images. It is not KID.",
    ),
    "network_kernel_distance": Definition(
        "Given network kernel distance",
        4,
        "lower",
        "Squared maximum mean discrepancy with KID's cubic kernel on the features of the network that "
        "evaluate.feature_network names, unbiased, so comparable between numbers of images. It is not KID.",
    ),
    "segmenter_kernel_distance": Definition(
        "Segmenter kernel distance",
        4,
        "lower",
        "Squared maximum mean discrepancy of real and generated images with a cubic kernel on the segmenter's "
        "features, unbiased (Binkowski et al. 2018), over all pairs; may be below 0 by chance. KID has another scale.",
    ),
    **_neighbourhoods("inception", "Inception", "Inception's features"),
    **_neighbourhoods("imagenet_lite", "ImageNet", "efficientnet-lite0's features"),
    **_neighbourhoods("network", "Given network", "the given network's features"),
    **_neighbourhoods("segmenter", "Segmenter", "the segmenter's features"),
    **_organ_means(
        "dice_either",
        "Dice, false organs count",
        "higher",
        "Dice over the organs present in either label map. An organ that only the second map has counts 0. Background "
        "and body are left out; mean over organs, then over images. An image without organs in both maps is left out.",
    ),
    "dice_mask_real": Definition(
        "Dice (mask, pred. real)",
        3,
        "higher",
        "Dice of the mask and the segmenter's labels on the real image, over the organs present in the mask, "
        "background and body left out; mean over organs, then over images. It is the best that the segmenter can do.",
    ),
    "dice_real_gen": Definition(
        "Dice (pred. real, pred. gen.)",
        3,
        "higher",
        "Dice of the segmenter's labels on the real and on the generated image, over the organs present in its labels "
        "on the real image, background and body left out; mean over organs, then over images.",
    ),
    "dice_mask_gen": Definition(
        "Dice (mask, pred. gen.)",
        3,
        "higher",
        "Dice of the mask and the segmenter's labels on the generated image, over the organs present in the mask. It "
        "measures whether the image follows its mask. An organ that is not in the mask does not lower it.",
    ),
    **_organ_means(
        "sensitivity",
        "Sensitivity",
        "higher",
        "Share of an organ's pixels in the reference that the other label map has too; mean over the organs present in "
        "the reference, then over images.",
    ),
    **_organ_means(
        "precision",
        "Precision",
        "higher",
        "Share of an organ's pixels in the other label map that the reference has too, 0 where the reference does not "
        "hold the organ; mean over the organs present in the other label map, then over images.",
    ),
    **_organ_means(
        "surface_dice",
        "Surface Dice",
        "higher",
        "Share of both outlines of an organ that is within the organ's tolerance (2 to 7 mm, at least a pixel) of "
        "the other outline (Nikolov et al. 2021); mean over the organs present, then over images.",
    ),
    **_organ_means(
        "area_error",
        "Area error",
        "lower",
        "Absolute difference of an organ's two areas, divided by the reference's; mean over the organs present, then "
        "over images.",
    ),
    **_false_positives(),
    "volume_error_mask_gen": Definition(
        "Volume error (mask, pred. gen.)",
        3,
        "lower",
        "Absolute difference of an organ's two areas, each summed over a patient's slices along an axis, divided by "
        "the mask's; mean over patients and axes.",
    ),
    "hu_mean_real": Definition(
        "Mean HU, real",
        1,
        "",
        "Mean HU inside the organ's mask on the real CT image, averaged over images; from 8-bit grey values, in which "
        "HU outside the window are clipped.",
    ),
    "hu_mean_gen": Definition(
        "Mean HU, generated",
        1,
        "",
        "Mean HU inside the organ's mask on the generated CT image, averaged over images; from 8-bit grey values, in "
        "which HU outside the window are clipped.",
    ),
    "hu_std_real": Definition(
        "HU spread, real",
        1,
        "",
        "Standard deviation of HU inside the organ's mask on the real CT image, averaged over images.",
    ),
    "hu_std_gen": Definition(
        "HU spread, generated",
        1,
        "",
        "Standard deviation of HU inside the organ's mask on the generated CT image, averaged over images.",
    ),
    "hu_mean_error": Definition(
        "HU error",
        1,
        "lower",
        "Absolute difference of the mean HU inside the organ's mask on the real and on the generated CT image, "
        "averaged over images.",
    ),
    "legacy_dice_mask_real": Definition(
        "Legacy Dice (mask, pred. real)",
        3,
        "higher",
        "Dice of the mask and the segmenter's labels on the real image as in Table 1 of Hunecke and Chen: the mean "
        "over all classes with background, where a class absent from both counts 1. It is too high for images with few "
        "organs. It is kept for comparison with the published rows.",
    ),
    "legacy_dice_real_gen": Definition(
        "Legacy Dice (pred. real, pred. gen.)",
        3,
        "higher",
        "Dice of the segmenter's labels on the real and on the generated image as in Table 1 of Hunecke and Chen: the "
        "mean over all classes with background, where a class absent from both counts 1.",
    ),
    "legacy_dice_mask_gen": Definition(
        "Legacy Dice (mask, pred. gen.)",
        3,
        "higher",
        "Dice of the mask and the segmenter's labels on the generated image as in Table 1 of Hunecke and Chen: the "
        "mean over all classes with background, where a class absent from both counts 1.",
    ),
    "pixel_std": Definition(
        "Pixel std (grey values)",
        2,
        "",
        "Standard deviation of each pixel over the images made from one mask, averaged over the patient's pixels.",
    ),
    "pairwise_ssim": Definition("Pairwise SSIM", 3, "", "SSIM of two images made from one mask, mean over pairs."),
    "pairwise_ms_ssim": Definition(
        "Pairwise MS-SSIM", 3, "", "MS-SSIM of two images made from one mask, mean over pairs; from 176 pixels."
    ),
    "pairwise_feature_distance": Definition(
        "Pairwise feature distance",
        3,
        "",
        "Euclidean distance of the segmenter's features of two images made from one mask, mean over pairs.",
    ),
}
