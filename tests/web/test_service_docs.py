"""/docs and the description behind it: open, bearing the key, with examples that work as they are;
in a real browser too.
"""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from fake_service import KEY, Service, fake_model, running_service

from autoregressive.models.classes import ClassNames
from autoregressive.serve.web.description import examples
from autoregressive.serve.web.schema import CodesRequest

BODIES = {
    "/v1/images/generations": "ImageRequest",
    "/v1/images/stream": "StreamRequest",
    "/v1/codes": "CodesRequest",
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Without a key."""
    with running_service(tmp_path_factory.mktemp("docs")) as service:
        yield service


def test_the_largest_seed_is_exact(service: Service) -> None:
    """Fails if the page, which reads its limits there, names another number than the server."""
    text = service.client.get("/openapi.json").text
    assert text.count(str(2**63 - 1)) == len(BODIES)
    assert "e+18" not in text


def test_the_description_says_which_operations_want_the_key(
    locked: Service, service: Service
) -> None:
    """Fails if a client that is made from the description sends no key where one is wanted, or one
    that nobody asks for.
    """
    document = locked.client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"] == {
        "HTTPBearer": {"type": "http", "scheme": "bearer"}
    }
    checked = 0
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            status = locked.client.request(method, path.replace("{model_id}", "fake")).status_code
            assert (status == 401) == (operation.get("security") == [{"HTTPBearer": []}]), path
            checked += status == 401
    assert checked >= 7
    open_document = service.client.get("/openapi.json").json()
    assert "securitySchemes" not in open_document["components"]
    assert not [
        one
        for operations in open_document["paths"].values()
        for one in operations.values()
        if "security" in one
    ]


def test_every_example_is_drawn(locked: Service) -> None:
    """Fails if what /docs fills in is refused: a seed that no JavaScript number holds, a
    temperature of 1e38, a model "string".
    """
    document = locked.client.get("/openapi.json").json()
    posted = 0
    for path, name in BODIES.items():
        content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        assert content["schema"] == {"$ref": f"#/components/schemas/{name}"}
        found = document["components"]["schemas"][name]["examples"]
        assert len(found) >= 2
        for body in found:
            answer = locked.client.post(path, json=body, headers={"Authorization": f"Bearer {KEY}"})
            assert answer.status_code == 200, (body, answer.text)
            assert "event: error" not in answer.text
            posted += 1
    assert posted >= 7


def test_examples_of_parameters_work(service: Service) -> None:
    """Fails if /docs fills in a model that there is not."""
    paths = service.client.get("/openapi.json").json()["paths"]
    (parameter,) = paths["/v1/models/{model_id}"]["get"]["parameters"]
    (model,) = parameter["examples"].values()
    assert service.client.get(f"/v1/models/{model['value']}").status_code == 200


@pytest.mark.parametrize("names", [("crane", "crane"), ("9", "nine"), ("a " * 40, "b")])
def test_the_example_is_a_class_that_can_be_asked_for(names: tuple[str, ...]) -> None:
    """Fails if the first class has a name that two classes bear, that is read as an id, or that is
    too long for a request.
    """
    model = replace(fake_model("fake"), classes=ClassNames(names))
    for body in examples(model)["CodesRequest"]:
        assert (
            model.engine_request(CodesRequest.model_validate(body), pixels=False).class_label == 0
        )


def test_the_description_has_nothing_left_of_what_is_not_answered(service: Service) -> None:
    """Fails if the framework's own errors are described, which this service never sends."""
    document = service.client.get("/openapi.json").json()
    assert "HTTPValidationError" not in document["components"]["schemas"]
    assert "ValidationError" not in document["components"]["schemas"]


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="needs Playwright to drive a browser"
    )
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium on the PATH")
    with sync_api.sync_playwright() as playwright:
        # Chromium keeps pages elsewhere from this machine itself; not every browser does.
        options = ["--no-sandbox", "--disable-features=LocalNetworkAccessChecks"]
        started = playwright.chromium.launch(executable_path=chromium, args=options)
        yield started
        started.close()


class Tab:
    """A page of the browser, and what went wrong in it."""

    def __init__(self, browser: Any) -> None:
        self.page = browser.new_page()
        self.page.set_default_timeout(15_000)
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on(
            "console", lambda said: self.wrong.append(said.text) if said.type == "error" else None
        )
        self.page.on("request", lambda sent: self.asked.append(sent.url))

    def execute(self, operation: str) -> int:
        """Opens an operation, tries it out as it is filled in; the status that the page shows."""
        block = self.page.locator(f"[id$={operation}]")
        block.locator(".opblock-summary-control").click()
        block.get_by_role("button", name="Try it out").click()
        block.get_by_role("button", name="Execute").click()
        shown = block.locator(".live-responses-table .response-col_status").last
        status = int(shown.inner_text().split()[0])
        block.locator(".opblock-summary-control").click()
        return status


OPERATIONS = [
    "generate_images_v1_images_generations_post",
    "draw_codes_v1_codes_post",
    "list_classes_v1_classes_get",
    "describe_model_v1_models__model_id__get",
    "tell_metrics_metrics_get",
]


def test_what_the_page_fills_in_works(browser: Any, service: Service) -> None:
    """Fails if /docs does not work under its content policy, or asks another server, or an example
    is refused.
    """
    tab = Tab(browser)
    tab.page.goto(f"{service.url}/docs")
    assert [tab.execute(operation) for operation in OPERATIONS] == [200] * len(OPERATIONS)
    assert tab.page.get_by_role("button", name="Authorize").count() == 0
    assert tab.wrong == []
    assert all(url.startswith((service.url, "data:")) for url in tab.asked)


def test_with_a_key_the_page_asks_for_it(browser: Any, locked: Service) -> None:
    """Fails if /docs cannot be opened without the key, or does not send the key that is
    typed in.
    """
    tab = Tab(browser)
    tab.page.goto(f"{locked.url}/docs")
    assert tab.execute("tell_version_version_get") == 401
    tab.wrong.clear()  # a browser reports each 401
    tab.page.get_by_role("button", name="Authorize").first.click()
    dialog = tab.page.locator(".modal-ux")
    dialog.get_by_role("textbox").fill(KEY)
    dialog.get_by_role("button", name="Apply credentials").click()
    dialog.get_by_role("button", name="Close").last.click()
    assert [tab.execute(operation) for operation in OPERATIONS] == [200] * len(OPERATIONS)
    assert tab.wrong == []


def test_the_page_works_below_a_path_of_a_proxy(browser: Any, service: Service) -> None:
    """Fails if a link leads to the root of the proxy's site, where another service may be."""
    outside = "http://proxy.example/images/of"
    tab = Tab(browser)

    def forward(route: Any) -> None:
        inside = route.request.url.replace(outside, service.url)
        headers = {name: value for name, value in route.request.headers.items() if name != "host"}
        route.fulfill(response=route.fetch(url=inside, headers=headers))

    tab.page.route(f"{outside}/**", forward)
    tab.page.route("http://proxy.example/*", lambda route: route.fulfill(status=404))
    tab.page.goto(f"{outside}/docs")
    assert [tab.execute(operation) for operation in OPERATIONS[:2]] == [200, 200]
    tab.page.goto(f"{outside}/")
    tab.page.locator(".chip").first.wait_for()
    assert tab.wrong == []
    assert all(url.startswith((f"{outside}/", "data:")) for url in tab.asked)


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_another_site_cannot_frame_a_page(browser: Any, service: Service, path: str) -> None:
    """Fails if a page elsewhere can have its visitors click on this one without seeing it."""
    tab = Tab(browser)
    frame = f'<iframe src="{service.url}{path}"></iframe>'
    tab.page.route(
        "http://evil.example/", lambda route: route.fulfill(body=frame, content_type="text/html")
    )
    with tab.page.expect_event("console", lambda said: "frame-ancestors" in said.text):
        tab.page.goto("http://evil.example/")
    assert not any(frame.url.startswith(service.url) for frame in tab.page.frames)
