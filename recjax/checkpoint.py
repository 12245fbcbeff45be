"""Checkpoints of a run: the newest few and the best one.

Each holds the train state and a small JSON record (position in the data,
stage, history of the best value). Orbax writes a checkpoint under another
name and renames it when whole, so that a killed run leaves the last one
intact. The state is stored without device axes and restored into given
shardings: a run may go on with another number of devices or another wrapper.
"""

import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from recjax.errors import UserError


class Checkpoints:
  """The folder `checkpoints/` of a workdir.

  Args:
    workdir: Folder of the run.
    keep: How many of the newest to keep; the best one is kept besides.
  """

  def __init__(self, workdir: str | os.PathLike, *, keep: int = 2):
    directory = epath.Path(workdir).expanduser().resolve() / "checkpoints"
    self._kept = _Kept(keep)
    self._manager = ocp.CheckpointManager(
      directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._kept, cleanup_tmp_directories=True
      ),
    )

  @property
  def latest_step(self) -> int | None:
    """Step of the newest whole checkpoint; None if there is none."""
    return self._manager.latest_step()

  def save(
    self,
    step: int,
    state: Any,
    record: dict[str, Any],
    *,
    best_step: int | None = None,
  ) -> None:
    """Saves in the background; `close` waits.

    Args:
      step: Updates so far; a step that is saved already is left alone.
      state: A train state without device axes.
      record: JSON data to hand back with it.
      best_step: The best step so far, whose checkpoint is kept however old.
    """
    self._kept.best_step = best_step
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        record=ocp.args.JsonSave({"arrays": _describe(state), **record}),
      ),
    )

  def record(self, step: int) -> dict[str, Any]:
    """The JSON record of one checkpoint.

    Raises:
      UserError: If it is damaged.
    """
    return {k: v for k, v in self._record(step).items() if k != "arrays"}

  def restore(self, step: int, target: Any) -> Any:
    """The state of one checkpoint.

    Args:
      step: Which.
      target: Shapes, types and shardings that the state must have.

    Raises:
      UserError: If the checkpoint is damaged or holds something else, as
        after a change of the config.
    """
    # Asked before: Orbax reads all it can and logs a trace for every misfit.
    held, wanted = self._record(step)["arrays"], _describe(target)
    for name in sorted(held.keys() | wanted.keys()):
      if held.get(name) != wanted.get(name):
        raise UserError(
          f"{self._manager.directory}/{step}: does not fit this config "
          f"({name}: {held.get(name)} there, {wanted.get(name)} asked for); "
          "use another --workdir"
        )
    return self._read(step, "state", ocp.args.StandardRestore(target))

  def close(self) -> None:
    """Waits for saves under way."""
    self._manager.wait_until_finished()
    self._manager.close()

  def _record(self, step: int) -> dict[str, Any]:
    record = self._read(step, "record", ocp.args.JsonRestore())
    if not isinstance(record, dict) or "arrays" not in record:
      raise self._damaged(step, "its record is not whole")
    return record

  def _read(self, step: int, item: str, args: Any) -> Any:
    try:
      restored = self._manager.restore(
        step, args=ocp.args.Composite(**{item: args})
      )
    except Exception as error:  # Orbax raises all kinds, `Exception` as well.
      reason = " ".join(str(error).split())[:200] or type(error).__name__
      raise self._damaged(step, reason) from error
    return restored[item]

  def _damaged(self, step: int, reason: str) -> UserError:
    return UserError(
      f"{self._manager.directory}/{step}: this checkpoint is damaged "
      f"({reason}); delete its folder to go on from the one before, or use "
      "another --workdir"
    )


def _describe(state: Any) -> dict[str, str]:
  """Path -> type and shape of every array."""
  leaves = jax.tree_util.tree_leaves_with_path(state)
  return {
    jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}"
    for path, leaf in leaves
  }


class _Kept(ocp.checkpoint_managers.PreservationPolicy):
  """The newest few and the one that the loop calls the best.

  Orbax's own choice by metric forgets the metrics when a run is resumed, and
  knows neither ties nor stages as the loop does.
  """

  def __init__(self, num_newest: int):
    self.num_newest, self.best_step = num_newest, None

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    newest = {info.step for info in checkpoints[-self.num_newest :]}
    return [info.step in newest | {self.best_step} for info in checkpoints]
