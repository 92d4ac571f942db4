# SPDX-License-Identifier: Apache-2.0
"""Many models are compared: a grid of target, oracles and methods."""
