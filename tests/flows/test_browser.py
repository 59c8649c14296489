"""What a person does and sees in Prefect's page: the form, the run, the report with its pictures.

`pytest tests/flows/test_browser.py --screenshots docs/images --basetemp /tmp/crane` writes the
pictures of the docs.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TinyPair
from crane_process import reached
from prefect_site import DEADLINE, Site, wait_until
from real_browser import browser_page, needs_chromium

SHOWN = """wanted => {
    const found = [...document.querySelectorAll("img[src^='data:image/png']")];
    const shows = image => image.complete && image.naturalWidth > 100 && image.clientWidth > 100;
    return found.length == wanted && found.every(shows);
}"""
pytestmark = [needs_chromium, pytest.mark.slow]


class Camera:
    """Takes the docs' pictures, if they were asked for."""

    def __init__(self, folder: str | None) -> None:
        self._folder = Path(folder) if folder else None

    @property
    def on(self) -> bool:
        return self._folder is not None

    def __call__(self, page: Any, name: str, height: int) -> None:
        """What the page shows, so many pixels of it."""
        if self._folder is None:
            return
        page.set_viewport_size({"width": 1200, "height": height})
        page.wait_for_timeout(2000)  # until animations have ended: a picture decides nothing
        self._folder.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=self._folder / f"{name}.png")


@pytest.fixture
def camera(request: pytest.FixtureRequest) -> Camera:
    return Camera(request.config.getoption("--screenshots"))


@pytest.fixture
def page() -> Iterator[Any]:
    with browser_page(DEADLINE) as found:
        yield found


def test_a_merge_is_started_from_the_form_and_its_report_shows(
    site: Site, page: Any, camera: Camera, moe_pair: TinyPair, tmp_path: Path
) -> None:
    page.goto(f"{site.url}/v2/deployments/deployment/{site.deployment('merge')['id']}/run")
    alpha = page.get_by_label("Alpha (Optional)")
    alpha.fill("-1")
    page.get_by_role("button", name="Submit").click()
    assert not alpha.evaluate("field => field.checkValidity()")
    assert page.url.endswith("/run")
    alpha.fill("0.5")
    recipe, name, output = "tiny", "tiny", str(site.folder / "merged")
    if not camera.on:  # a pair of random weights is faster, and less to look at
        recipe, name, output = "recipe", "tiny-random", str(tmp_path / "out")
        page.get_by_label("Recipe file (Optional)").fill(str(moe_pair.recipe_file))
        page.get_by_label("Output folder (Optional)").fill(output)
        page.get_by_label("Store (Optional)").fill(str(tmp_path / "store"))
    camera(page, "prefect-form", 1500)
    page.get_by_role("button", name="Submit").click()

    run = wait_until(lambda: site.newest(f"{recipe}, alpha 0.5"), "the run of the form")
    page.goto(f"{site.url}/v2/runs/flow-run/{run}")
    if camera.on:  # of tiny weights the line may be out of sight before the page is there
        page.get_by_text("scores: started").first.wait_for()
        camera(page, "prefect-running", 1000)
    assert site.state(run) == "Completed", site.logs(run)
    show_report(site, page, run, f"{name}-report", pictures=4)
    page.get_by_text(output).first.wait_for()
    camera(page, "prefect-report", 2000)


def test_a_killed_run_is_finished_by_retry_in_its_menu(
    site: Site, page: Any, camera: Camera, moe_pair: TinyPair, tmp_path: Path
) -> None:
    place = {"output": str(tmp_path / "out"), "advanced": {"store": str(tmp_path / "store")}}
    run = site.start("merge", recipe_file=str(moe_pair.recipe_file), alpha=0.4, **place)
    process = wait_until(lambda: site.flow_process(run), "the flow's process")
    wait_until(reached(tmp_path / "store", "scores", 1), "a scored layer", pause=0.001)
    process.kill()
    assert site.state(run) == "Crashed"
    page.goto(f"{site.url}/v2/runs/flow-run/{run}")
    page.get_by_text("Crashed").first.wait_for()
    page.get_by_role("button", name="Open menu").first.click()
    retry = page.get_by_role("menuitem", name="Retry")
    retry.wait_for()
    camera(page, "prefect-crashed", 900)
    retry.click()
    page.get_by_role("button", name="Retry", exact=True).click()
    wait_until(lambda: "SCHEDULED" in site.history(run)[3:], "the retry")
    site.retry(run)  # if the worker's second report undid it
    assert site.state(run) == "Completed", site.logs(run)
    assert site.tasks(run)["tiny-random: scores"] == "Resumed"


def show_report(site: Site, page: Any, run: str, key: str, *, pictures: int) -> None:
    """Open an artifact's page; every picture must be there and be more than a frame."""
    page.goto(f"{site.url}/v2/artifacts/artifact/{site.artifacts(run)[key]['id']}")
    page.wait_for_function(SHOWN, arg=pictures)


def test_a_schedule_is_switched_on_in_the_page_and_keeps_its_grid(
    site: Site, page: Any, camera: Camera
) -> None:
    def nightly() -> dict[str, Any]:
        return site.deployment("nightly-crane-30b", "sweep")

    page.goto(f"{site.url}/v2/deployments/deployment/{nightly()['id']}")
    page.locator("button[role=switch][aria-checked=false]").first.wait_for()
    camera(page, "prefect-schedules", 700)
    try:
        page.locator("button[role=switch][aria-checked=false]").first.click()
        wait_until(lambda: nightly()["schedules"][0]["active"], "the switch")
        ours = {"id": {"any_": [nightly()["id"]]}}
        due = wait_until(lambda: site.find("flow_runs", deployments=ours), "its next runs")
        assert {tuple(run["parameters"]["alphas"]) for run in due} == {(0.15, 0.2, 0.25, 0.3)}
    finally:
        path = f"/deployments/{nightly()['id']}/schedules/{nightly()['schedules'][0]['id']}"
        site.api("PATCH", path, {"active": False}).raise_for_status()


def test_what_a_sweep_and_a_second_merge_look_like(site: Site, page: Any, camera: Camera) -> None:
    """For the docs alone: what is behind these pages is tested elsewhere."""
    if not camera.on:
        pytest.skip("takes pictures: --screenshots FOLDER")
    first = site.start("merge")
    assert site.state(first) == "Completed", site.logs(first)
    again = site.start("merge", alpha=0.3)
    swept = site.start("sweep", alphas=[0.25, 0.5, 0.65], taus=[0.01, 0.03],
                       require=["tool_calls>=0.99"])  # fmt: skip
    assert site.state(again) == "Completed", site.logs(again)
    page.goto(f"{site.url}/v2/runs/flow-run/{again}")
    page.get_by_role("tab", name="Task Runs").click()
    page.get_by_text("tiny: delta").first.wait_for()
    camera(page, "prefect-reused", 1150)
    assert site.state(swept) == "Completed", site.logs(swept)
    show_report(site, page, swept, "tiny-sweep-report", pictures=1)
    camera(page, "prefect-sweep", 1400)
