"""The parts of MONAI that this project uses: networks and a loss."""

from data_shards import lean_imports

# Other parts of MONAI import these; MONAI treats a missing one as optional.
with lean_imports.without("matplotlib", "mlflow", "nibabel", "pandas", "scipy", "skimage", "sklearn", "zarr"):
    from monai.losses import DiceCELoss
    from monai.networks.nets import PatchDiscriminator, UNet, resnet50

__all__ = ["DiceCELoss", "PatchDiscriminator", "UNet", "resnet50"]
