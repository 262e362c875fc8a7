# Copyright (c) torchao_masquant contributors.
# All rights reserved.
#
# This source code is licensed under the BSD 3-Clause license found in the
# LICENSE file in the root directory of this source tree.
"""One visit to a GPU: see ``benchmarks/gpu_visit.sh``, which runs its stages."""
