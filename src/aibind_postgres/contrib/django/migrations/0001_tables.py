from django.db import migrations

from .._operations import RunSqlFile


class Migration(migrations.Migration):
    dependencies = []
    operations = [RunSqlFile("0001_tables.sql")]
