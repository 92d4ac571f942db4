# SPDX-License-Identifier: Apache-2.0
"""The commands of `alter-peft`, a file each: checks what it is given, returns what is then to be run."""
