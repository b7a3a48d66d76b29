"""python -m onekernel"""

import sys

from onekernel.cli import main

sys.exit(main())
