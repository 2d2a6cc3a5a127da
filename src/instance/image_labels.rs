//! Messages about labels and variables that the image has as well, so that it is unknown who set them.

use crate::config::Settings;
use crate::containers::Definition;
use crate::containers::labels::ContainerSpec;

/// Why the container gets no credentials: its image has labels or variables that choose them, with the same values.
pub(super) fn problem(container: &Definition, spec: &ContainerSpec, settings: &Settings) -> Option<String> {
    if !spec.labeled && settings.default_role.is_none() {
        return None;
    }
    let has_role = spec.role.is_some() || spec.profile.is_some() || settings.default_role.is_some();
    let names = match spec.unclear.is_empty() {
        true if has_role => &spec.unclear_place,
        _ => &spec.unclear,
    };
    if !names.is_empty() {
        return Some(unknown_setter(container, &names.join(", ")));
    }
    (!spec.joined_policies.is_empty()).then(|| {
        format!(
            "{}, and there is another session policy: STS joins the session policies of one call instead of intersecting them",
            unknown_setter(container, &spec.joined_policies.join(", "))
        )
    })
}

/// The labels that the image has as well, and of which only the restrictions count.
pub(super) fn note(container: &Definition, settings: &Settings) -> Option<String> {
    let prefix = format!("{}.", settings.label_prefix);
    let names = container.labels.ambiguous().keys();
    let names: Vec<_> = names.filter(|name| name.starts_with(&prefix)).cloned().collect();
    let why = match container.image_is_known {
        true => "the image has the same value",
        false => "the image cannot be read",
    };
    (!names.is_empty()).then(|| {
        format!(
            "label {}: {why}, so only restrictions count; [docker] image_labels = true lets labels of images count",
            names.join(", ")
        )
    })
}

/// The message about labels and variables that choose something, and that the image may have set.
pub(super) fn unknown_setter(container: &Definition, names: &str) -> String {
    match container.image_is_known {
        true => format!(
            "{names}: the image has the same value, so it is unknown who set it; write the value in another form (the ARN of a role \
             instead of its name), remove it from the image, or set [docker] image_labels = true"
        ),
        false => format!(
            "{names}: the image cannot be read (it was removed, or is for another platform), so it is unknown who set it; create the container \
             again from an image for this host, or set [docker] image_labels = true"
        ),
    }
}
