import sys

from flux2_studio.cli.main import main

sys.exit(main())
