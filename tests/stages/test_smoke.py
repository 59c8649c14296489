def test_x(tiny_pair, tmp_path):
    from artifacts.store import Store
    from flows.merge import merge
    r = tiny_pair.recipe(f"run.output={tmp_path}/out")
    m = merge(r, Store(tmp_path/"store"))
    assert [s.status for s in m.stages] == ["computed"]*7
    m = merge(r, Store(tmp_path/"store"))
    assert [s.status for s in m.stages] == ["reused"]*7
    print(m.as_json())
