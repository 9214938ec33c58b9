"""The options for what a video is made from besides its prompt: images, videos and masks."""

from argparse import ArgumentParser

from ..jobs import IMAGE_SCALES


def add_condition_options(parser: ArgumentParser) -> None:
    """Adds the options for images, videos and masks."""
    group = parser.add_argument_group("images and videos to start from or to follow")
    group.add_argument(
        "--image", help="start image, for an image-to-video or inpaint model; resized to cover and cropped at the centre"
    )
    group.add_argument("--end-image", help="end image, for an inpaint model or weights for frame interpolation")
    group.add_argument(
        "--image-scale",
        choices=IMAGE_SCALES,
        default="auto",
        help="scaling of the start image's latent; auto: the checkpoint's own",
    )
    group.add_argument("--image-strength", type=float, default=1.0, help="scale of the latent of the image or images")
    group.add_argument(
        "--image-start", type=float, default=0.0, help="share of the steps at which the model is first shown them"
    )
    group.add_argument("--image-end", type=float, default=1.0, help="share of the steps after which it is shown none")
    group.add_argument("--control-video", help="video of poses, edges or depth, for a control model")
    group.add_argument("--control-strength", type=float, default=1.0, help="scale of the control video's latent")
    group.add_argument("--control-start", type=float, default=0.0, help="share of the steps at which control begins")
    group.add_argument("--control-end", type=float, default=1.0, help="share of the steps at which control ends")
    group.add_argument(
        "--controlnet", metavar="PATH", help="ControlNet for CogVideoX 1.0: a folder with config.json, or a .safetensors file"
    )
    group.add_argument("--controlnet-video", metavar="FILE", help="video of edges for --controlnet")
    group.add_argument("--controlnet-strength", type=float, default=1.0, help="scale of what the ControlNet adds")
    group.add_argument("--controlnet-start", type=float, default=0.0, help="share of the steps at which the ControlNet begins")
    group.add_argument("--controlnet-end", type=float, default=1.0, help="share of the steps at which the ControlNet ends")
    group.add_argument("--video", help="video to start from; resized and cropped as --image")
    group.add_argument(
        "--mask",
        help="image or video, white where --video is to be replaced; for an inpaint or object removal model; for the latter grey is what the "
        "removal changes too",
    )
    group.add_argument(
        "--invert-mask", action="store_true", help="--mask is black where --video is to be replaced, as VOID's quadmask_0.mp4"
    )
    group.add_argument(
        "--noise-aug-strength",
        type=float,
        metavar="NOISE",
        help="noise on what an inpaint model is shown, for pixels in -1..1 (default: as it was trained)",
    )
    group.add_argument(
        "--source-fps",
        type=float,
        help="frame rate of --video, --control-video, --controlnet-video and --mask; every n-th frame is used, so that the rate comes nearest to "
        "the model's own; 0 uses every frame (default: as the file says)",
    )
    group.add_argument(
        "--denoise", type=float, help="with --video: share of the steps to run on it (default 0.8; with --mask 1)"
    )
