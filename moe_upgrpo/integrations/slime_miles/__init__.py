# SPDX-License-Identifier: Apache-2.0
"""The part that slime and miles share: a preset inside their policy loss, their actor's log.

`moe_upgrpo.integrations.slime` and `.miles` say where in each stack that is.
"""
