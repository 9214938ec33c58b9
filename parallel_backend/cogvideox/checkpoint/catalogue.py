"""The published models: short names, and their repositories on both hubs."""

import re
from dataclasses import dataclass

ORGANISATIONS = {"zai-org": "ZhipuAI", "alibaba-pai": "PAI"}
"""The same organisations on the Hugging Face hub and on ModelScope."""
DOWNLOAD = "python -m parallel_backend download"
APACHE, COGVIDEOX = "Apache 2.0", "CogVideoX licence"
GIGABYTES = {"2b": 13, "5b": 21, "1.5-5b": 21}
"""About how much is downloaded for each base: transformer, text encoder and VAE in 16 bits. The hub knows it exactly."""


@dataclass(frozen=True)
class Published:
    """A published model."""

    repository: str
    """Of the Hugging Face hub, ORG/NAME."""
    base: str
    """``2b``, ``5b`` or ``1.5-5b``: the model's shape."""
    task: str = "text"
    licence: str = COGVIDEOX

    @property
    def folder(self) -> str:
        """The name of the folder that it is downloaded into: NAME of ORG/NAME."""
        return self.repository.partition("/")[2]

    @property
    def terms(self) -> str:
        """About its size, and its licence."""
        return f"{GIGABYTES[self.base]} GB, {self.licence}"


MODELS = {
    "2b": Published("zai-org/CogVideoX-2b", "2b", licence=APACHE),
    "5b": Published("zai-org/CogVideoX-5b", "5b"),
    "5b-i2v": Published("zai-org/CogVideoX-5b-I2V", "5b", "image"),
    "1.5": Published("zai-org/CogVideoX1.5-5B", "1.5-5b"),
    "1.5-i2v": Published("zai-org/CogVideoX1.5-5B-I2V", "1.5-5b", "image"),
    "fun-2b-inp": Published("alibaba-pai/CogVideoX-Fun-V1.1-2b-InP", "2b", "inpaint"),
    "fun-5b-inp": Published("alibaba-pai/CogVideoX-Fun-V1.1-5b-InP", "5b", "inpaint"),
    "fun-5b-control": Published("alibaba-pai/CogVideoX-Fun-V1.1-5b-Control", "5b", "control"),
    "fun-5b-pose": Published("alibaba-pai/CogVideoX-Fun-V1.1-5b-Pose", "5b", "control"),
    "fun-1.5-inp": Published("alibaba-pai/CogVideoX-Fun-V1.5-5b-InP", "1.5-5b", "inpaint"),
    "sparkvsr": Published("JiongzeYu/SparkVSR", "1.5-5b", "image", "licence on its page"),
}
"""The published models by their short names."""
ALONE = {"void": Published("netflix/void-model", "1.5-5b", "removal")}
"""Models that are published as single files of the transformer, which ``download`` does not get. ``plan`` knows them too."""


def published(name: str) -> Published | None:
    """Returns the published model with a short name or a repository, in capital or small letters; None if there is none."""
    known = MODELS | ALONE
    by_repository = {model.repository.lower(): model for model in known.values()}
    return (known | by_repository).get(name.lower())


def named_after(folder: str) -> str | None:
    """Returns the short name of the published model whose folder has a name, in capital or small letters; None if there is none."""
    return next((name for name, model in MODELS.items() if model.folder.lower() == folder.lower()), None)


def repository_of(name: str) -> str | None:
    """Returns the ORG/NAME that a name means: that of a published model, or the name itself; None for any other text."""
    if (model := published(name)) and name.lower() not in ALONE:
        return model.repository
    return name if re.fullmatch(r"[\w-][\w.-]*/[\w.-]*[\w-]", name, re.ASCII) else None


def on_modelscope(repository: str) -> str:
    """Returns the ORG/NAME on ModelScope of a repository of the Hugging Face hub."""
    organisation, _, name = repository.partition("/")
    return f"{ORGANISATIONS.get(organisation, organisation)}/{name}"
