"""The hubs that models are downloaded from: which files a repository has, and where each is."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import quote

from huggingface_hub import HfApi, constants, errors, hf_hub_url
from huggingface_hub.utils import build_hf_headers, get_session

from ...errors import Cancelled, Failure, RequestError, reason_of
from ...system.files import FULL
from . import catalogue

MODELSCOPE = "https://modelscope.cn"
TIMEOUT = 30.0
"""Seconds that a hub may take to answer a question."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository, as the hub's API describes it."""

    path: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None
    """Git's name of a small file that is not stored as a large one: SHA-1 of its size and content."""


@dataclass(frozen=True)
class Repository:
    """A repository at one moment."""

    name: str
    page: str
    licence: str
    commit: str | None
    """None if the hub does not say."""
    files: list[RemoteFile]


class HuggingFace:
    """The Hugging Face hub, or a mirror of it that ``HF_ENDPOINT`` names."""

    title = "Hugging Face"

    def __init__(self):
        self.endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT

    @property
    def headers(self) -> dict[str, str]:
        """The headers of each request, with the user's token if there is one."""
        return build_hf_headers(library_name="cogvideox-xdit")

    def look(self, repository: str) -> Repository:
        """Asks which files a repository has.

        Args:
            repository: ORG/NAME.
        Raises:
            RequestError: if there is no such repository, or its licence must be accepted first.
            Failure: if the hub does not answer.
        """
        page = f"{self.endpoint}/{repository}"
        with answering(self.endpoint):
            try:
                info = HfApi(endpoint=self.endpoint).model_info(
                    repository, revision="main", files_metadata=True, timeout=TIMEOUT
                )
            except errors.GatedRepoError as error:
                raise RequestError(f"{repository}: accept its licence at {page}, run `hf auth login`, and try again") from error
            except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
                raise RequestError(f"there is no repository {repository} at {self.endpoint}; see {page}") from error
        files = [
            RemoteFile(each.rfilename, each.size or 0, each.lfs.sha256 if each.lfs else None, each.blob_id)
            for each in info.siblings or ()
        ]
        card = info.card_data or {}
        words = [card.get(key) for key in ("license_name", "license_link")]
        licence = " ".join(str(word) for word in [None if words[0] else card.get("license"), *words] if word)
        return Repository(info.id, page, licence or f"see {page}", info.sha, files)

    def url(self, repository: Repository, file: RemoteFile) -> str:
        """Returns where a file is."""
        return hf_hub_url(repository.name, file.path, revision=repository.commit, endpoint=self.endpoint)


class ModelScope:
    """modelscope.cn, which is fast in China, or another one that ``MODELSCOPE_ENDPOINT`` names."""

    title = "ModelScope"
    headers: dict[str, str] = {}

    def __init__(self):
        self.endpoint = os.environ.get("MODELSCOPE_ENDPOINT") or MODELSCOPE

    def look(self, repository: str) -> Repository:
        """Asks which files a repository has; see :meth:`HuggingFace.look`."""
        name = catalogue.on_modelscope(repository)
        page = f"{self.endpoint}/models/{name}"
        about, listed = self._ask(f"{name}?Revision=master"), self._ask(f"{name}/repo/files?Revision=master&Recursive=True")
        if listed is None:
            raise RequestError(f"there is no repository {name} at {self.endpoint}; see {page}")
        files = [
            RemoteFile(each["Path"], each["Size"], each.get("Sha256")) for each in listed["Files"] if each["Type"] != "tree"
        ]
        return Repository(name, page, (about or {}).get("License") or f"see {page}", None, files)

    def _ask(self, question: str) -> dict | None:
        """Returns the data of an answer; None if there is no such repository."""
        with answering(self.endpoint):
            answer = get_session().get(f"{self.endpoint}/api/v1/models/{question}", timeout=TIMEOUT)
            if answer.status_code == 404:
                return None
            answer.raise_for_status()
            return answer.json()["Data"]

    def url(self, repository: Repository, file: RemoteFile) -> str:
        """Returns where a file is."""
        return f"{self.endpoint}/api/v1/models/{repository.name}/repo?Revision=master&FilePath={quote(file.path, safe='')}"


Hub = HuggingFace | ModelScope
HUBS = {"huggingface": HuggingFace, "modelscope": ModelScope}


@contextmanager
def answering(endpoint: str) -> Iterator[None]:
    """Within the context, whatever goes wrong is raised as a Failure of one line, but for a disk that is full."""
    try:
        yield
    except (RequestError, Failure, Cancelled):
        raise
    except Exception as error:  # the hub's library has changed its errors from one version to the next
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        raise Failure(
            f"{endpoint} does not answer as expected: {reason_of(error)}; check the network and try again: it goes on where it "
            "stopped. From China, ModelScope or a mirror in HF_ENDPOINT may work better"
        ) from error
