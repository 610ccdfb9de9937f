package androidx.compose.foundation.layout

import androidx.compose.runtime.Composable
import androidx.compose.ui.Modifier
import androidx.compose.ui.unit.Dp

interface ColumnScope

object Arrangement {
    interface Vertical

    fun spacedBy(space: Dp): Vertical = TODO()
}

fun Column(
    modifier: Modifier = Modifier,
    verticalArrangement: Arrangement.Vertical,
    content: @Composable ColumnScope.() -> Unit,
) {}

fun Modifier.padding(all: Dp): Modifier = this

fun Modifier.fillMaxWidth(fraction: Float = 1f): Modifier = this
