"""Django's command line: `DATABASE_URL=postgresql://… python examples/django_chat/manage.py runserver`."""

import os
import sys
from pathlib import Path

from django.core.management import execute_from_command_line

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))  # for the packages django_chat and shared
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "django_chat.settings")
    execute_from_command_line(sys.argv)
