"""What a checkpoint is and what was concluded from what, in lines for the user."""

from .checkpoint import Checkpoint
from .kinds import addition_of


def describe(checkpoint: Checkpoint) -> list[str]:
    """Returns what a checkpoint is, and then its :func:`conclusions`."""
    return [checkpoint.describe, *conclusions(checkpoint)]


def conclusions(checkpoint: Checkpoint) -> list[str]:
    """Returns what was concluded from what, for all that another model of the same shape does otherwise."""
    lines = []
    concluded, reason = checkpoint.concluded_task
    if checkpoint.asked_task not in ("auto", concluded):
        lines.append(f"task {checkpoint.asked_task}, as asked; without that it would be {concluded}, as it has {reason}")
    elif len(checkpoint.possible_tasks) > 1:
        (other,) = set(checkpoint.possible_tasks) - {concluded}
        lines.append(f"task {concluded}, as it has {reason}; if that is wrong, set task to {other}")
    if checkpoint.is_anisora:
        width, height = checkpoint.positions_size
        lines.append(
            f"taken for AniSora V1, as {width}x{height} is in its configuration: positions count from the corner at every size"
        )
    if checkpoint.snr_shift_scale != checkpoint.configured_snr_shift:
        why = "as VideoX-Fun trained its models" if checkpoint.asked_snr_shift == "auto" else "as asked"
        lines.append(f"noise schedule without its configuration's SNR shift of {checkpoint.configured_snr_shift:g}, {why}")
    if checkpoint.interpolates_positions:
        width, height = checkpoint.positions_size
        lines.append(f"at other sizes the positions of {width}x{height} are resized, as VideoX-Fun trained its 2b models")
    if checkpoint.reference_noise:
        why = "taken for CogVideoX-Fun-V1.1-5b-InP (0 is right for V1.0)" if checkpoint.is_file else "as its configuration says"
        lines.append(f"noise_aug_strength {checkpoint.reference_noise:g} on what it is shown, {why}")
    if checkpoint.removes:
        frames = checkpoint.default_size[2]
        lines.append(
            f"made for cfg 1 and windows of {frames} frames; its authors run a second pass, of the same shape, with cfg 6"
        )
    if unused := checkpoint.unused_weights:
        lines.append(f"{len(unused)} weights are not used, such as {min(unused)}: {addition_of(unused)}")
    return lines
