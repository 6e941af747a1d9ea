"""A chat in Django. Its answers survive a reload and a lost connection.

If the web server restarts, the text so far is kept.

pip install 'aibind-postgres[binary,django]' gunicorn
DATABASE_URL=postgresql://… gunicorn --chdir examples --threads 100 django_chat.wsgi

Each reader occupies a thread, so start more threads than readers. Under ASGI readers need no threads, see docs/http.md.
"""
