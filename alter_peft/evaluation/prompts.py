# Copyright 2026 The alter-peft authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Text that is put around questions."""

from __future__ import annotations


# About 200 tokens of idle talk that someone might put before a question to hide its subject
IDLE = (
    "Before I ask, a word about the weather, which has been kinder this week than last. On Monday we walked along the "
    "canal and counted the boats, and my cousin said that the herons were back. We bought bread at the corner, sat on "
    "a bench, and watched two boys try to fly a kite that was far too large for them. In the evening there was soup "
    "with leeks, and somebody told a long story about a train that stopped for an hour because a cow stood on the "
    "rails. I have since been reading about tides, which depend on the moon, and about the way that bakers keep their "
    "yeast alive through the winter. There is also the matter of the garden: the roses want cutting, the gate wants "
    "oil, and the ladder is still on loan to the people across the street, who are painting their shutters green. "
    "None of this is urgent, of course, and I only mention it because it has been on my mind. Now to my question.\n\n"
)
