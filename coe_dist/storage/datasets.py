"""data.folder, be it a path or a URL: what its side-cars say, and the .beton files on this machine."""

from __future__ import annotations

from pathlib import Path

from coe_dist.config import DataConfig, StagingConfig, is_url
from coe_dist.data.samples import samples_path
from coe_dist.data.sidecar import SplitInfo, parse_sidecar, read_sidecar, sidecar_path
from coe_dist.errors import InputError
from coe_dist.storage.remote import Remote, StoreError
from coe_dist.storage.staging import add_samples, copies, staged, staging_folder

_here: dict[tuple[DataConfig, str], Path] = {}  # staged copies that this process reads


def is_staged(data: DataConfig) -> bool:
    """Whether readers use copies on their own machine."""
    return is_url(data.folder) or data.staging.folder is not None


def place_of(data: DataConfig, split: str) -> str:
    """Path or URL of a split's .beton."""
    return f"{data.folder.rstrip('/')}/{split}.beton" if is_url(data.folder) else str(_path(data, split))


def is_written(data: DataConfig, split: str) -> bool:
    """Whether there is such a split, whole or not. Raises InputError for a store that cannot be reached."""
    if not is_url(data.folder):
        beton = _path(data, split)
        return beton.is_file() or sidecar_path(beton).is_file()
    remote = Remote(data.folder, "data.folder")
    try:
        remote.size(f"{split}.json")
    except FileNotFoundError:
        return False
    except StoreError as error:
        raise InputError(f"data.folder: {remote.shown} cannot be read; {error}") from error
    return True


def sidecar_of(data: DataConfig, split: str) -> SplitInfo:
    """A split's side-car; of a URL nothing else is read. Raises InputError as read_sidecar does, and where the store
    cannot be reached."""
    if (data, split) in _here:
        return read_sidecar(_here[data, split])
    if is_url(data.folder):
        return _described(Remote(data.folder, "data.folder"), f"{split}.beton")[1]
    return read_sidecar(_path(data, split))


def beton_of(data: DataConfig, split: str) -> Path:
    """The file to read on this machine, copied to it if need be. Raises InputError as `staged` does."""
    if not is_staged(data):
        return _path(data, split)
    if (data, split) not in _here:
        url = data.folder if is_url(data.folder) else f"file://{Path(data.folder).absolute()}"
        _here[data, split] = _staged(Remote(url, "data.folder"), f"{split}.beton", data.staging)
    return _here[data, split]


def copied_beton(data: DataConfig, split: str) -> Path:
    """The file to look at without asking a store: of a URL the copy that was used last. It may not exist."""
    if not is_url(data.folder):
        return _path(data, split)
    source = place_of(data, split)
    here = copies(staging_folder(data.staging))
    return next((copy.file for copy in reversed(here) if copy.source == source), Path(source))


def local_beton(place: str) -> Path:
    """A .beton by its path, or by its URL: then a copy, with its list of samples."""
    if not is_url(place):
        return Path(place)
    folder, _, name = place.rpartition("/")
    if not name.endswith(".beton"):
        raise InputError(f"FILE: {Remote(place, 'FILE').shown} is not allowed; give the address of a .beton file")
    remote = Remote(folder, "FILE")
    beton = _staged(remote, name, StagingConfig())
    try:
        add_samples(remote, samples_path(beton))
    except StoreError as error:
        raise InputError(f"{remote.place(samples_path(beton).name)} cannot be read; {error}") from error
    return beton


def _staged(remote: Remote, name: str, staging: StagingConfig) -> Path:
    return staged(remote, name, *_described(remote, name), staging)


def _described(remote: Remote, name: str) -> tuple[bytes, SplitInfo]:
    """The side-car's content and meaning. The .beton's size must fit it."""
    sidecar = sidecar_path(Path(name)).name
    asked = sidecar
    try:
        content = remote.read(sidecar)
        asked = name
        size = remote.size(name)
    except FileNotFoundError:
        raise InputError(
            f"{remote.place(asked)}: no such file in the store; put there all that `coe-dist data write` made"
        ) from None
    except StoreError as error:
        raise InputError(f"{remote.place(asked)} cannot be read; {error}") from error
    info = parse_sidecar(content, remote.place(sidecar))
    if size != info.bytes:
        raise InputError(
            f"{remote.place(name)}: {size} bytes, but {info.bytes} in its side-car; put the file there again"
        )
    return content, info


def _path(data: DataConfig, split: str) -> Path:
    return Path(data.folder) / f"{split}.beton"
