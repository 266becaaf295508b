import sys

from imf.data.prepare.pack import main

sys.exit(main())
