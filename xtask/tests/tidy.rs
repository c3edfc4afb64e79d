//! The tree keeps the rules of the house.

#[test]
fn the_tree_is_tidy() {
    let problems = xtask::tidy::check(&xtask::root()).expect("the sources can be read");
    assert!(problems.is_empty(), "{} problems:\n{}", problems.len(), problems.join("\n"));
}
