from django.db import migrations

from .._operations import RunSqlFile


class Migration(migrations.Migration):
    dependencies = [("aibind_postgres", "0003_conversations")]
    operations = [RunSqlFile("0004_chats.sql")]
