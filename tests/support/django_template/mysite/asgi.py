import os

from django.core.asgi import get_asgi_application

from aibind_postgres.contrib.django import with_lifespan

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mysite.settings")
application = with_lifespan(get_asgi_application())
