"""What this project takes from MONAI: a network and a loss."""

from data_shards import lean_imports

# MONAI's other parts want these, and each takes a missing one for an optional one.
with lean_imports.without("matplotlib", "mlflow", "nibabel", "pandas", "scipy", "skimage", "sklearn", "zarr"):
    from monai.losses import DiceCELoss
    from monai.networks.nets import UNet

__all__ = ["DiceCELoss", "UNet"]
