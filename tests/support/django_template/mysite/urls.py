from chat import views
from django.contrib import admin
from django.contrib.staticfiles.urls import staticfiles_urlpatterns
from django.urls import path

from aibind_postgres.contrib import django as aibind

urlpatterns = [
    path("admin/", admin.site.urls),
    *aibind.urlpatterns(views.handler),
    *aibind.urlpatterns(views.async_handler),
    *staticfiles_urlpatterns(),
]
