from django.db import migrations

from .._operations import RunSqlFile


class Migration(migrations.Migration):
    dependencies = [("aibind_postgres", "0001_tables")]
    operations = [RunSqlFile("0002_housekeeping.sql")]
