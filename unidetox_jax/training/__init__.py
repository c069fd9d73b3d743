"""Training steps and the loop around them.

optimizer = training.Optimizer(learning_rate=5e-5, steps=3000)          # settings; see make_optimizer for optax
state = training.init_state(params, optimizer)                          # takes ownership of the parameters
step = training.make_train_step(cfg, optimizer, mesh, dropout_seed=1)   # compiled once per shape of batch
state, metrics = step(state, batch)                                     # donates the state

params, summary = training.fit(directory, cfg, lambda: params, batches, training.LoopSettings(3000), optimizer, mesh)
totals = training.make_eval_step(cfg, mesh)(state.params, batch)        # {"total", "targets"}
step.lower(training.abstract_state(cfg, optimizer, mesh), abstract_batch).compile()   # without the devices
"""

from unidetox_jax.training.criterion import LANGUAGE_MODELLING, Criterion
from unidetox_jax.training.loop import CHECKPOINTS, LoopSettings, fit
from unidetox_jax.training.loss import Batch, loss, target_losses, target_mask
from unidetox_jax.training.optimizer import PRECISIONS, Optimizer, make_optimizer
from unidetox_jax.training.step import TrainState, abstract_state, init_state, make_eval_step, make_train_step
