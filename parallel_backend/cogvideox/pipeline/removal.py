"""What an object removal model (VOID) is shown: the whole video, and a mask of four levels, both encoded by the VAE.

The formula is that of the training and of the first pass of its authors (Netflix/void-model 66e9c0e,
``scripts/cogvideox_fun/train.py`` with ``train_void.sh``, ``data/dataset_image_video.py``, ``predict_v2v.py``):

- The mask is resized and then rounded to 0 (kept), 63, 127 (affected by the removal) or 255 (removed), of 255. A mask as its authors
  store it is the other way round, with 63 for what is both removed and affected. Turned round that is 192, so it counts as removed.
- The VAE encodes ``1 - mask`` in three equal channels, without scaling 0..1 to -1..1 as it does for pictures.
- The video is shown whole, with the object in it.
- Both are multiplied by the VAE's scaling factor. The channels are noise, mask, video.

ComfyUI's own node (0.33, VOIDInpaintConditioning) differs: it blackens the video where the mask is 1 and darkens it where the mask is
grey, scales the mask to -1..1, and rounds it before it is resized. What that node gives is used as it is.
"""

import torch

LEVELS, EDGES = (0, 63, 127, 255), (31, 95, 191)
"""The levels of a mask in 0..255, and the largest value that is rounded to each but the last."""


def rounded(mask: torch.Tensor) -> torch.Tensor:
    """Rounds a mask in 0..1, where 1 is removed, to the levels of the training."""
    return (torch.tensor(LEVELS) / 255)[torch.bucketize(mask.contiguous(), torch.tensor(EDGES) / 255)]


def shown_mask(mask: torch.Tensor) -> torch.Tensor:
    """Returns the pixels ``[frames, height, width, 3]`` whose encoding shows a mask to the model.

    Args:
        mask: ``[frames, height, width]`` in 0..1, where 1 is removed, 0.5 is affected by the removal, and 0 is kept.
    Returns:
        Pixels in 0.5..1: the VAE gets them scaled to -1..1, and so in 0..1.
    """
    return (1 - rounded(mask) / 2)[..., None].expand(*mask.shape, 3)
