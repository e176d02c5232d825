"""Imported first by the process from which tests fork ranks: imports then what the process of a training imports."""

import gc

from data_shards import lean_imports

lean_imports.begin()

from segdiff_dist.training.deepspeed_internals import import_deepspeed  # noqa: E402

import_deepspeed()

gc.freeze()  # a rank that collects garbage would copy every page of this process
