# SPDX-License-Identifier: Apache-2.0
"""The part shared by slime and miles: a preset inside their policy loss, and their actor's log.

`moe_upgrpo.integrations.slime` and `.miles` say where each stack has these.
"""
