# SPDX-License-Identifier: Apache-2.0
"""`alter-peft demo`: a real, small model forgets three facts that it knows."""
