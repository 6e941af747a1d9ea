from django.db import migrations

from .._operations import RunSqlFile


class Migration(migrations.Migration):
    dependencies = [("aibind_postgres", "0002_housekeeping")]
    operations = [RunSqlFile("0003_conversations.sql")]
