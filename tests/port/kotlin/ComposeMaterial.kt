package androidx.compose.material3

import androidx.compose.runtime.Composable
import androidx.compose.ui.Modifier

interface RowScope

fun MaterialTheme(content: @Composable () -> Unit) {}

fun Text(text: String, modifier: Modifier = Modifier) {}

fun Button(onClick: () -> Unit, modifier: Modifier = Modifier, enabled: Boolean = true, content: @Composable RowScope.() -> Unit) {}

fun LinearProgressIndicator(progress: () -> Float, modifier: Modifier = Modifier) {}

fun OutlinedTextField(
    value: String,
    onValueChange: (String) -> Unit,
    modifier: Modifier = Modifier,
    label: @Composable (() -> Unit)? = null,
) {}
