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

_POLICIES = ocp.checkpoint_managers.preservation_policy


class Checkpoints:
  """The folder `checkpoints/` of a workdir.

  Args:
    workdir: Folder of the run.
    keep: How many of the newest to keep; the best one is kept besides.
  """

  def __init__(self, workdir: str | os.PathLike, *, keep: int = 2):
    directory = epath.Path(workdir).expanduser().resolve() / "checkpoints"
    policy = _POLICIES.AnyPreservationPolicy(
      [
        _POLICIES.LatestN(keep),
        _POLICIES.BestN(
          get_metric_fn=lambda metrics: metrics["monitor"],
          n=1,
          keep_checkpoints_without_metrics=False,
        ),
      ]
    )
    self._manager = ocp.CheckpointManager(
      directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policy, cleanup_tmp_directories=True
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
    monitor: float | None = None,
  ) -> None:
    """Saves in the background; `close` waits.

    Args:
      step: Updates so far; a step that is saved already is left alone.
      state: A train state without device axes.
      record: JSON data to hand back with it.
      monitor: What the best checkpoint is the largest of.
    """
    if step in self._manager.all_steps():
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        record=ocp.args.JsonSave(record),
      ),
      metrics=None if monitor is None else {"monitor": monitor},
    )

  def record(self, step: int) -> dict[str, Any]:
    """The JSON record of one checkpoint."""
    restored = self._manager.restore(
      step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
    )
    return restored["record"]

  def restore(self, step: int, target: Any) -> Any:
    """The state of one checkpoint.

    Args:
      step: Which.
      target: Shapes, types and shardings that the state must have.

    Raises:
      UserError: If the checkpoint holds something else, as after a change of
        the config.
    """
    try:
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(state=ocp.args.StandardRestore(target)),
      )
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(
        f"{self._manager.directory}/{step}: does not fit this config "
        f"({str(error).splitlines()[0][:200]}); use another --workdir"
      ) from error
    state = restored["state"]
    shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    if shapes(state) != shapes(target):
      raise UserError(
        f"{self._manager.directory}/{step}: holds arrays of other shapes than "
        "this config asks for; use another --workdir"
      )
    return state

  def close(self) -> None:
    """Waits for saves under way."""
    self._manager.wait_until_finished()
    self._manager.close()


def _monitor(metrics: dict[str, float]) -> float:
  return metrics["monitor"]
