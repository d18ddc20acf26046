import sys

from flux2_studio.cli import main

sys.exit(main())
