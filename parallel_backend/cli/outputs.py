"""The videos to make, and the files they are written to."""

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from ..errors import RequestError


@dataclass(frozen=True)
class Video:
    """One video to make."""

    prompt: str
    seed: int
    output: Path
    latents: Path | None

    @property
    def files(self) -> list[Path]:
        """The files it is written to."""
        return [path for path in (self.output, self.latents) if path]


def videos_of(args: Namespace) -> list[Video]:
    """Returns the videos to make. Files are numbered from 1 if the options can ask for several.

    Raises:
        RequestError: for a wrong count or a prompts file that cannot be read.
    """
    if args.count < 1:
        raise RequestError(f"--count is {args.count}; use 1 or more")
    prompts = [args.prompt] if args.prompts_file is None else read_prompts(Path(args.prompts_file))
    wanted = [(prompt, args.seed + place) for prompt in prompts for place in range(args.count)]
    output, latents = Path(args.output), Path(args.save_latents) if args.save_latents else None
    if args.prompts_file is None and args.count == 1:
        return [Video(*wanted[0], output, latents)]
    digits = len(str(len(wanted)))

    def numbered(path: Path | None, number: int) -> Path | None:
        return path and path.with_stem(f"{path.stem}-{number:0{digits}d}")

    return [Video(*words, numbered(output, number), numbered(latents, number)) for number, words in enumerate(wanted, 1)]


def read_prompts(path: Path) -> list[str]:
    """Reads the prompts in a file, one a line. Skips empty lines."""
    try:
        prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--prompts-file {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not prompts:
        raise RequestError(f"--prompts-file {path} has no prompt; write one a line")
    return prompts
