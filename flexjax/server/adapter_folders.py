"""AdapterFolders: from which folders owners may load adapters. It knows no names of adapters but those of jobs.

Where keys are asked for, an owner of the file of keys has a folder of its own in adapter_dir, the operator the rest.
"""

import os
from collections.abc import Collection
from pathlib import Path

from flexjax.server.data_folder import DataFolder
from flexjax.server.errors import ApiError
from flexjax.server.keys import OPERATOR
from flexjax.server.prompts import BodyError, shortened
from flexjax.server.trained_models import JOB_NAMES, TrainedModels


class AdapterFolders:
    """Any thread may call it.

    Args:
        root: adapter_dir.
        owners: of the file of keys; none where no keys are asked for.
        private: keys are asked for.
    """

    def __init__(self, root: Path, owners: Collection[str], private: bool, folder: DataFolder, trained: TrainedModels):
        self._root, self._owners, self._private = root, frozenset(owners), private
        self._folder, self._trained = folder, trained

    def find(self, owner: str, path: str) -> Path:
        """The folder that an owner's path means, links followed.

        Raises:
            BodyError: it lies outside the owner's. ApiError: there is none, or none that the owner may read.
        """
        try:
            root = self._root_of(owner).resolve()
            folder = (root / path).resolve()
            inside, there = folder.is_relative_to(root), os.path.isdir(folder)
        except (ValueError, OSError, RuntimeError) as error:  # a zero byte, links in a circle
            raise BodyError(f"lora_path is {shortened(path)}, which is no path", "lora_path") from error
        if not inside:
            raise BodyError(f"lora_path is {shortened(path)}, which is outside {self._shown(owner)}", "lora_path")
        if not there or not self._may_read(owner, folder):
            raise ApiError(404, f"There is no folder {shortened(path)} in {self._shown(owner)}.", "lora_path")
        return folder

    def place_of(self, owner: str, folder: Path) -> str:
        """Where a folder that was found lies in the owner's, so that it is found again when adapter_dir has moved."""
        return str(folder.relative_to(self._root_of(owner).resolve()))

    def hidden(self, owner: str, message: str) -> str:
        """A message without what only those who run the server may know: where it keeps things."""
        own = "adapter_dir" if owner == OPERATOR else f"adapter_dir/{owner}"
        message = message.replace(str(self._root_of(owner).resolve()), own)
        return message.replace(str(self._root.resolve()), "adapter_dir")

    def _root_of(self, owner: str) -> Path:
        return self._root / owner if owner != OPERATOR else self._root

    def _shown(self, owner: str) -> str:
        return "the server's adapter_dir" if owner == OPERATOR else f"the server's adapter_dir/{owner}, your part of it"

    def _may_read(self, owner: str, folder: Path) -> bool:
        """Whether an owner may read a folder of its part: the operator nothing of an owner, and in the service's own
        folder nobody what jobs of others made."""
        if not self._private:
            return True
        if owner == OPERATOR and self._owners.intersection(folder.relative_to(self._root.resolve()).parts[:1]):
            return False
        if not folder.is_relative_to(self._folder.root):
            return True
        place = folder.relative_to(self._folder.root).parts
        if place[:1] != ("adapters",):
            return False
        return len(place) < 2 or not place[1].startswith(JOB_NAMES) or self._trained.owner_of(place[1]) == owner
