"""A chat in Django whose answers survive a reload, a lost network and a restart of the server.

pip install 'aibind-postgres[binary,django]' gunicorn
DATABASE_URL=postgresql://… gunicorn --chdir examples --threads 100 django_chat.wsgi

Each reader takes a thread while he reads, so have more of them than readers, or see README for ASGI.
"""
