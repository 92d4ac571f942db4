# SPDX-License-Identifier: Apache-2.0
"""The version of the package, in a file that everything may import."""

__version__ = "0.1.0.dev0"
