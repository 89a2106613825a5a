"""Two processes of this machine, in the background.

lm launch up launch/examples/local.py configs/quickstart.py --follow
"""

import sys

from launch.config import Machines
from launch.local import Local

config = Machines(name="quickstart", local=Local(processes=2, devices=1), python=sys.executable)
