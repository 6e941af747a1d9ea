from django.db import migrations

from .._operations import RunSqlFile


class Migration(migrations.Migration):
    dependencies: list[tuple[str, str]] = []
    operations = [RunSqlFile("0001_tables.sql")]
